"""A checkpoint that is not what its config says, or not whole, in one line that says so.

`check_files` looks at the files before a card is opened; `refuse_tensor` and `refuse_missing` at
what a loader hands over, whatever it comes from.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sglang_hma.prefill.ttnn.pieces import source_shapes
from sglang_hma.prefill.ttnn.shape import ModelShape

# Of no use here: rotary tables are made anew.
HARMLESS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
REFERENCE = "--hma-prefill-runtime reference"


class OddCheckpoint(ValueError):
    """In one line: which file or tensor, what is wrong with it, and what to do."""


def check_files(folder: Path, shape: ModelShape) -> None:
    """The safetensors files of a checkpoint, by their headers; the values only of a tied model's
    second output head. Another format is left to its loader. Raises OddCheckpoint."""
    found: dict[str, Path] = {}
    for file in _files(folder):
        for name, (size, dtype) in _header(file).items():
            if name in found:
                raise OddCheckpoint(
                    f"{name} is in both {found[name].name} and {file.name}: remove the file that "
                    "does not belong to the checkpoint"
                )
            found[name] = file
            refuse_tensor(shape, name, size, dtype)
    if not found:
        return
    refuse_missing(shape, found)
    if shape.tied and HEAD in found:
        refuse_head(*(_tensor(found[name], name) for name in (EMBEDDING, HEAD)))


def refuse_tensor(shape: ModelShape, name: str, size: Iterable[int], dtype: object) -> None:
    """For one that the runtime would not use, because then it would compute another model; for one
    of another shape or of a quantized format. A tied model's own output head is compared with the
    embedding (refuse_head). dtype: torch's. Raises OddCheckpoint."""
    if name.endswith(HARMLESS):
        return
    if dtype not in FLOATS.values():
        raise OddCheckpoint(
            f"{name} of the checkpoint is {str(dtype).removeprefix('torch.')}: it is quantized, "
            f"and the runtime packs BF16, F16 or F32. Use the model's unquantized checkpoint, or "
            f"{REFERENCE} --hma-weight-format native"
        )
    wanted = source_shapes(shape).get(name)
    if wanted is None and name == HEAD and shape.tied:
        wanted = (shape.vocab, shape.hidden)
    if wanted is None:
        raise OddCheckpoint(_without_use(shape, name))
    if tuple(size) != wanted:
        raise OddCheckpoint(
            f"{name} of the checkpoint is {list(size)}, and the config makes it {list(wanted)}: "
            "take config.json and weights from the same model"
        )


def refuse_missing(shape: ModelShape, names: Iterable[str]) -> None:
    """`names`: of all tensors that the checkpoint has. Raises OddCheckpoint."""
    wanted, have = source_shapes(shape), set(names)
    missing = [name for name in wanted if name not in have]
    if not missing:
        return
    layers = {
        int(found[1]) for name in have if (found := re.match(r"model\.layers\.(\d+)\.", name))
    }
    if layers and len(layers) < shape.layers:
        raise OddCheckpoint(
            f"the config has num_hidden_layers = {shape.layers}, and the checkpoint {len(layers)} "
            "layers: take config.json and weights from the same model"
        )
    first = missing[0]
    if first.endswith(".bias"):
        raise OddCheckpoint(
            f"the checkpoint has no {first}, and the config says that there is one "
            f"({_bias_field(first)}): take config.json and weights from the same model"
        )
    raise OddCheckpoint(
        f"the checkpoint has no {first} ({len(missing)} tensors missing): fetch all of its files "
        "again, or take config.json from the same model"
    )


def refuse_head(embedding: torch.Tensor, head: torch.Tensor) -> None:
    """For a tied model's. Raises OddCheckpoint."""
    if not torch.equal(embedding.bfloat16(), head.bfloat16()):
        raise OddCheckpoint(
            f"the config has tie_word_embeddings, and {HEAD} of the checkpoint differs from "
            f"{EMBEDDING}: set tie_word_embeddings to false in config.json if the head was trained"
        )


def _without_use(shape: ModelShape, name: str) -> str:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= shape.layers:
        return (
            f"the config has num_hidden_layers = {shape.layers}, and the checkpoint {name}: take "
            "config.json and weights from the same model"
        )
    if layer and name.endswith("_proj.bias"):
        return (
            f"the checkpoint has {name}, and the config says that there is none "
            f"({_bias_field(name)}, architectures): left out, it would compute another model. Take "
            f"config.json and weights from the same model, or serve this one with {REFERENCE}"
        )
    return (
        f"the checkpoint has {name}, for which the Tenstorrent runtime has no use: it would "
        f"compute another model. Serve this one with {REFERENCE}"
    )


def _bias_field(name: str) -> str:
    return "mlp_bias" if ".mlp." in name else "attention_bias"


def _files(folder: Path) -> list[Path]:
    """Those that SGLang's loader takes: of an index, or all but the vendor's own of Mistral."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        return [f for f in files if not f.name.startswith("consolidated")] or files
    try:
        places: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OddCheckpoint(f"{index} is no index of safetensors files: fetch it again") from error
    for name in names:
        if not (folder / name).is_file():
            tensors = sum(place == name for place in places.values())
            raise OddCheckpoint(
                f"{index} names {name} ({tensors} tensors), which is not there: fetch it"
            )
    return [folder / name for name in names]


def _header(file: Path) -> dict[str, tuple[list[int], object]]:
    """Shape and dtype of each tensor."""
    from safetensors import SafetensorError

    try:
        with _opened(file) as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: (part.get_shape(), FLOATS.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            start = opened.read(40)
        if start.startswith(b"version https://git-lfs"):
            raise OddCheckpoint(
                f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` there"
            ) from error
        raise OddCheckpoint(
            f"{file} ({file.stat().st_size} bytes) is cut off or damaged: fetch it again ({error})"
        ) from error


def _tensor(file: Path, name: str) -> torch.Tensor:
    with _opened(file) as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt", device="cpu")
