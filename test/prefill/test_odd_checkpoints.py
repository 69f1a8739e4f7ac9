"""Checkpoints that are not what they should be: each gets one line of its own, before a card opens.

The files are real ones, of transformers and safetensors, and go through the launcher's own check.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_hma.config import WeightFormats
from sglang_hma.launch.flags import Refusal
from sglang_hma.launch.model import check_model
from sglang_hma.prefill.ttnn.card import opened
from sglang_hma.prefill.ttnn.checkpoint import INDEX, OddCheckpoint, check_files
from sglang_hma.prefill.ttnn.shape import ModelShape
from sglang_hma.prefill.ttnn.weights import Weights
from test.launch.reading import PREFILL, start

from .models import KINDS, random_model, saved

pytestmark = pytest.mark.usefixtures("stand_in")

Tensors = dict[str, torch.Tensor]
Odd = Callable[[Path], None]
LAYER = "model.layers.1."
NORM, HEAD = "model.norm.weight", "lm_head.weight"
WORD = "take config.json and weights from the same model"


def place(folder: Path, name: str) -> Path:
    """The file that has tensor `name`."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def tensors(change: Callable[[Tensors], object], near: str = NORM) -> Odd:
    """Changes those of the file that has `near`."""

    def odd(folder: Path) -> None:
        file = place(folder, near)
        content = load_file(file)
        change(content)
        save_file({name: value.contiguous() for name, value in content.items()}, file)

    return odd


def fields(**changes: object) -> Odd:
    def odd(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return odd


def bytes_of(change: Callable[[bytes], bytes]) -> Odd:
    def odd(folder: Path) -> None:
        file = place(folder, NORM)
        file.write_bytes(change(file.read_bytes()))

    return odd


def pointer(_: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def another_copy(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["more"] = "more.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    save_file({NORM: torch.ones(256)}, folder / "more.safetensors")


# What is done to a whole checkpoint of two layers, and what its line says.
ODD: dict[str, tuple[Odd, list[str]]] = {
    "an extra tensor": (
        tensors(lambda t: t.update({f"{LAYER}pre_feedforward_layernorm.weight": torch.ones(256)})),
        [f"has {LAYER}pre_feedforward_layernorm.weight", "no use", "runtime reference"],
    ),
    "a missing tensor": (
        tensors(lambda t: t.pop(NORM)),
        [f"has no {NORM} (1 tensors missing)", "fetch all of its files again"],
    ),
    "a bias that the config has not": (
        tensors(lambda t: t.update({f"{LAYER}self_attn.o_proj.bias": torch.ones(256)})),
        [f"has {LAYER}self_attn.o_proj.bias", "there is none (attention_bias", WORD[1:]],
    ),
    "no bias where the config has one": (
        fields(mlp_bias=True),
        ["has no model.layers.0.mlp.gate_proj.bias", "there is one (mlp_bias)", WORD],
    ),
    "a factor of the residual stream": (
        fields(residual_multiplier=0.22),
        ["residual_multiplier = 0.22", "may change the arithmetic", "runtime reference"],
    ),
    "a soft cap": (
        fields(attn_logit_softcapping=50.0),
        ["attn_logit_softcapping = 50.0", "may change the arithmetic", "runtime reference"],
    ),
    "another shape": (
        tensors(lambda t: t.update({NORM: torch.ones(128)})),
        [f"{NORM} of the checkpoint is [128], and the config makes it [256]", WORD],
    ),
    "a file that is cut off": (
        bytes_of(lambda content: content[:-100]),
        ["FILE", "bytes) is cut off or damaged: fetch it again", "file not fully covered"],
    ),
    "a file that is cut off in its header": (
        bytes_of(lambda content: content[:30]),
        ["FILE", "(30 bytes) is cut off or damaged: fetch it again"],
    ),
    "a pointer in place of a file": (
        bytes_of(pointer),
        ["FILE", "Git LFS pointer", "git lfs pull"],
    ),
    "8-bit integers": (
        tensors(lambda t: t.update({NORM: torch.ones(256, dtype=torch.int8)})),
        [f"{NORM} of the checkpoint is I8: it is quantized", "unquantized checkpoint"],
    ),
    "8-bit floats": (
        tensors(lambda t: t.update({NORM: torch.ones(256).to(torch.float8_e4m3fn)})),
        [f"{NORM} of the checkpoint is F8_E4M3: it is quantized", "--hma-weight-format native"],
    ),
    "more layers than the config has": (
        fields(num_hidden_layers=1),
        ["num_hidden_layers = 1, and the checkpoint model.layers.1.", WORD],
    ),
    "fewer layers than the config has": (
        fields(num_hidden_layers=3),
        ["num_hidden_layers = 3, and the checkpoint 2 layers", WORD],
    ),
    "a tied model's other head": (
        fields(tie_word_embeddings=True),
        ["has tie_word_embeddings", f"{HEAD} of the checkpoint differs", "to false in config.json"],
    ),
    "a shard that is not there": (
        lambda folder: place(folder, NORM).unlink(),
        [f"{INDEX} names SHARD", "which is not there: fetch it"],
    ),
    "no index": (
        lambda folder: (folder / INDEX).write_text("{}") and None,
        [f"{INDEX} is no index of safetensors files: fetch it again"],
    ),
    "a tensor twice": (
        another_copy,
        [f"{NORM} is in both", "more.safetensors", "remove the file"],
    ),
    "windows": (
        fields(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=256),
        ["sliding_window is 256, less than the served context of 512", "--context-length 256"],
    ),
}


def whole(folder: Path) -> Path:
    hf = random_model("llama").bfloat16()
    hf.save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("whole"))


def refusal(folder: Path) -> str | None:
    """What the launcher says instead of starting a prefill server on a card."""
    on_card = ("--hma-prefill-runtime", "ttnn")
    config, server_args = start("--model-path", str(folder), *PREFILL, *on_card)
    assert config.on_card
    try:
        check_model(config, server_args)
    except Refusal as refused:
        return str(refused)
    return None


def test_a_whole_checkpoint_is_taken(checkpoint: Path) -> None:
    assert refusal(checkpoint) is None
    assert len(set(json.loads((checkpoint / INDEX).read_text())["weight_map"].values())) > 3


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_checkpoint_gets_a_line_of_its_own(
    checkpoint: Path, tmp_path: Path, odd: str
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = place(tmp_path, NORM)
    change, words = ODD[odd]
    change(tmp_path)
    message = refusal(tmp_path)
    print(message)
    assert message is not None and "\n" not in message

    def says(words: list[str]) -> bool:
        return all(
            w.replace("FILE", str(file)).replace("SHARD", file.name) in message for w in words
        )

    assert says(words)
    assert [name for name, (_, words) in ODD.items() if says(words)] == [odd]


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_is_taken(tmp_path: Path, kind: str) -> None:
    hf = random_model(kind, tied=kind.startswith("qwen3"))
    hf.save_pretrained(tmp_path)
    check_files(tmp_path, ModelShape.of(hf.config))
    names = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert names | {HEAD} == saved(hf).keys()


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_models_own_head_is_the_embedding(same: bool) -> None:
    """Also from files that have no headers to look at."""
    hf = random_model("llama", tied=True)
    named = saved(hf) | {HEAD: hf.lm_head.weight + (0 if same else 1)}
    with opened() as card:
        weights = Weights(ModelShape.of(hf.config), card, None, WeightFormats())
        if same:
            weights.load(named.items())
            return
        with pytest.raises(OddCheckpoint, match="has tie_word_embeddings"):
            weights.load(named.items())


def test_quantized_tensors_are_no_weights() -> None:
    """Converted in silence, they were weights without their scales."""
    hf = random_model("llama")
    named = saved(hf) | {NORM: torch.ones(256, dtype=torch.int8)}
    with opened() as card, pytest.raises(OddCheckpoint, match=rf"{NORM} of .* is int8: it is"):
        Weights(ModelShape.of(hf.config), card, None, WeightFormats()).load(named.items())
