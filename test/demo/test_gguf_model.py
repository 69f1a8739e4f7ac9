"""A GGUF file that the gguf package wrote from a known model becomes that model again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sglang_hma.demo.folder import DemoModelError
from sglang_hma.demo.gguf_model import convert
from sglang_hma.demo.random_model import make_random_model

LAYERS = 2
SIZES = dict(layers=LAYERS, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=192)
ARCHITECTURES = {"qwen3": gguf.MODEL_ARCH.QWEN3, "llama": gguf.MODEL_ARCH.LLAMA}
Edit = Callable[[str, np.ndarray], np.ndarray | None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        family: make_random_model(folder / family, family=family, vocab=600, **SIZES)
        for family in ARCHITECTURES
    }


def as_llama_cpp(name: str, weight: np.ndarray, heads: dict[str, int]) -> np.ndarray:
    """Of a Llama: rows of a head's two halves take turns, as llama.cpp rotates them."""
    for suffix, count in heads.items():
        if name.endswith(suffix):
            halves = weight.reshape(count, 2, -1, weight.shape[-1])
            return halves.swapaxes(1, 2).reshape(weight.shape)
    return weight


def write_gguf(
    model: Path,
    file: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    edit: Edit = lambda _, weight: weight,
    architecture: str | None = None,
    **fields: Any,
) -> dict[str, np.ndarray]:
    """What a reader must find: the weights under the model's own names, as the file holds them."""
    config = json.loads((model / "config.json").read_text())
    family = config["model_type"]
    heads = {"q_proj.weight": config["num_attention_heads"]}
    heads["k_proj.weight"] = config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, architecture or family)
    writer.add_block_count(LAYERS)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, model, fields.pop("pre", "gpt-2"))
    for key, value in fields.items():
        writer.add_uint16(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], LAYERS)
    held = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        weight = tensor.to(torch.float32).numpy()
        if family == "llama":
            weight = as_llama_cpp(name, weight, heads)
        edited = edit(name, weight)
        if edited is None:
            continue
        own = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(edited, own)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=own)
        held[name] = gguf.quants.dequantize(data, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def add_tokenizer(writer: gguf.GGUFWriter, model: Path, pre: str) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"] | {
        token["content"]: token["id"] for token in tokenizer["added_tokens"]
    }
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    config = json.loads((model / "config.json").read_text())
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template((model / "chat_template.jinja").read_text())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_weights_and_text_come_through(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    write_gguf(models[family], tmp_path / "model.gguf")
    made = convert(tmp_path / "model.gguf", tmp_path / "made")
    expected = load_file(models[family] / "model.safetensors")
    found = load_file(made / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name

    def read(folder: Path, file: str) -> dict[str, Any]:
        return dict(json.loads((folder / file).read_text()))

    for file in ("config.json", "generation_config.json"):
        ours, theirs = read(made, file), read(models[family], file)
        for key in theirs.keys() - {"transformers_version", "initializer_range", "dtype"}:
            nearly = isinstance(theirs[key], float | dict)  # float32 in GGUF
            assert ours.get(key) == (pytest.approx(theirs[key]) if nearly else theirs[key]), key

    text = "def f(x):\n    return x[2026] + 'naïve 日本 🙂'"
    mine, original = (AutoTokenizer.from_pretrained(folder) for folder in (made, models[family]))
    turn = [{"role": "user", "content": text}]
    assert mine.encode(text) == original.encode(text)
    assert mine.apply_chat_template(turn) == original.apply_chat_template(turn)
    assert mine.decode(mine.encode(text)) == text


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16"])
def test_quantized_weights_are_what_the_file_says(
    models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    held = write_gguf(models["qwen3"], tmp_path / "model.gguf", kind=quantization)
    found = load_file(convert(tmp_path / "model.gguf", tmp_path / "made") / "model.safetensors")
    assert found.keys() == held.keys()
    for name, values in held.items():
        assert torch.equal(found[name], torch.from_numpy(values.copy()).to(torch.bfloat16)), name


def test_digits_are_split_as_the_vocabulary_was_learned(
    models: dict[str, Path], tmp_path: Path
) -> None:
    def pieces(folder: Path) -> list[str]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        spans = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x 2026 1st")
        return [piece for piece, _ in spans]

    for pre in ("smollm", "gpt-2", "qwen2", "llama-bpe"):
        write_gguf(models["qwen3"], tmp_path / f"{pre}.gguf", pre=pre)
        convert(tmp_path / f"{pre}.gguf", tmp_path / pre)
    assert pieces(tmp_path / "smollm") == ["x", "Ġ", "2", "0", "2", "6", "Ġ", "1", "st"]
    assert pieces(tmp_path / "qwen2") == pieces(tmp_path / "smollm")
    assert pieces(tmp_path / "gpt-2") == ["x", "Ġ2026", "Ġ1", "st"]
    assert pieces(tmp_path / "llama-bpe") == ["x", "Ġ", "202", "6", "Ġ", "1", "st"]


def without(lost: str) -> Edit:
    return lambda name, weight: None if name.endswith(lost) else weight


def spoiled(name: str, weight: np.ndarray) -> np.ndarray:
    if name.endswith("1.mlp.up_proj.weight"):
        weight[3, 5] = np.nan
    return weight


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(edit=without("layers.1.mlp.up_proj.weight")), "layers.1.mlp.up_proj.weight"),
        (dict(edit=spoiled), "layers.1.mlp.up_proj.weight has values that are not finite"),
        (dict(split__count=3), "one of 3 pieces"),
        (dict(pre="martian"), "tokenizer.ggml.pre is 'martian'"),
        (dict(architecture="martian"), "(martian) cannot be read by transformers"),
    ],
)
def test_a_file_that_is_no_whole_model_is_refused(
    models: dict[str, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    write_gguf(models["qwen3"], tmp_path / "model.gguf", **changes)
    with pytest.raises(DemoModelError) as refusal:
        convert(tmp_path / "model.gguf", tmp_path / "made")
    assert words in str(refusal.value) and "model.gguf" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_damaged_files_are_refused(models: dict[str, Path], tmp_path: Path, seed: int) -> None:
    write_gguf(models["qwen3"], tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    rng = np.random.default_rng(seed)
    cuts = [0, 3, 4, 24, *rng.integers(25, len(whole) - 1, 12).tolist()]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(DemoModelError, match=r"cut\.gguf"):
            convert(tmp_path / "cut.gguf", tmp_path / "made")
    (tmp_path / "cut.gguf").write_bytes(b"PK" + whole[2:])
    with pytest.raises(DemoModelError, match="no GGUF file"):
        convert(tmp_path / "cut.gguf", tmp_path / "made")
    with pytest.raises(DemoModelError, match="No such file"):
        convert(tmp_path / "none.gguf", tmp_path / "made")
    assert not (tmp_path / "made").exists()
