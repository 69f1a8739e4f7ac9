"""Weights from a checkpoint and from the cache on disk, on the stand-in for ttnn."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_hma.config import WeightFormats
from sglang_hma.prefill.ttnn import card as cards
from sglang_hma.prefill.ttnn.card import CardError, open_card, opened
from sglang_hma.prefill.ttnn.config_fields import check_fields
from sglang_hma.prefill.ttnn.errors import UnsupportedModel
from sglang_hma.prefill.ttnn.pieces import pieces, source_shapes
from sglang_hma.prefill.ttnn.shape import ModelShape
from sglang_hma.prefill.ttnn.weights import (
    WeightCache,
    Weights,
    checkpoint_folder,
    fingerprint,
)

from .models import KINDS, random_model, saved

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.mark.parametrize(
    ("kind", "tied"),
    [("qwen3", True), ("qwen2", False), ("llama", False), ("phi3", False), ("qwen3_moe", False)],
)
def test_second_start_reads_the_cache_alone(
    rng: np.random.Generator, tmp_path: Path, kind: str, tied: bool
) -> None:
    hf = random_model(kind, tied=tied)
    shape, cache = ModelShape.of(hf.config), WeightCache(tmp_path)
    with opened() as card:
        first = Weights(shape, card, cache, WeightFormats())
        assert not first.load_cached()
        named = list(saved(hf).items())
        first.load(named[i] for i in rng.permutation(len(named)))
        second = Weights(shape, card, cache, WeightFormats())
        assert second.load_cached()
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.value, second[name].value)
        assert tensor.dtype == second[name].dtype and tensor.layout == second[name].layout
    assert not list(tmp_path.glob(f"*.{os.getpid()}.tensorbin"))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "llama, biases", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("chips", [2, 4])
def test_chips_share_the_weights(tmp_path: Path, kind: str, chips: int) -> None:
    """Every chip's part of what one chip would hold; the cache keeps the parts."""
    hf = random_model(kind, kv_heads=4, vocab=520)
    shape, cache = ModelShape.of(hf.config), WeightCache(tmp_path)
    heads, kv, dim = shape.heads // chips, shape.kv_heads // chips, shape.head_dim
    with opened() as one, opened(range(chips), chips) as several:
        whole = Weights(shape, one, None, WeightFormats())
        Weights(shape, several, cache, WeightFormats()).load(saved(hf).items())
        whole.load(saved(hf).items())
        parts = Weights(shape, several, cache, WeightFormats())
        assert parts.load_cached()
    for name, tensor in whole.tensors.items():
        expected, got = tensor.value, parts[name].values
        assert len(got) == chips
        kind_of = name.rpartition(".")[2]
        if kind_of in ("wqkv", "wqkv_bias"):
            q, k, v = expected.split([n * dim for n in (shape.heads, *[shape.kv_heads] * 2)], -1)
            for chip, part in enumerate(got):
                columns = (
                    x[..., chip * n * dim :][..., : n * dim]
                    for x, n in ((q, heads), (k, kv), (v, kv))
                )
                assert torch.equal(part, torch.cat(list(columns), -1))
        elif kind_of in ("wo", "down"):
            assert torch.equal(torch.cat(got, -2), expected)
        elif kind_of in ("gate", "up", "gate_bias", "up_bias") or name.startswith("spread"):
            assert torch.equal(torch.cat(got, -1), expected)
        elif kind_of == "lm_head":
            joined = torch.cat(got, -1)
            assert torch.equal(joined[:, :520], expected[:, :520]) and not joined[:, 520:].any()
        else:
            assert all(torch.equal(part, expected) for part in got)


def test_formats_by_group(rng: np.random.Generator) -> None:
    hf = random_model("llama")
    with opened() as card:
        packed, some = (
            Weights(ModelShape.of(hf.config), card, None, formats)
            for formats in (WeightFormats(), WeightFormats(attention="native", head="native"))
        )
        for weights in (packed, some):
            weights.load(hf.state_dict().items())
    for name, tensor in packed.tensors.items():
        kept = name == "lm_head" or name.endswith(("wqkv", "wo"))
        assert (some[name].dtype == tensor.dtype) is not kept, name
    assert torch.equal(some["lm_head"].value, hf.lm_head.weight.T)


def test_experts_have_a_format_of_their_own() -> None:
    hf = random_model("qwen3_moe, some dense", layers=3)
    shape = ModelShape.of(hf.config)
    all_packed, some = WeightFormats(), WeightFormats(experts="native")
    with opened() as card:
        packed, mixed = (Weights(shape, card, None, formats) for formats in (all_packed, some))
        for weights in (packed, mixed):
            weights.load(saved(hf).items())
    changed = {n for n, tensor in packed.tensors.items() if mixed[n].dtype != tensor.dtype}
    assert changed == {
        *(f"spread.{group}" for group in range(shape.experts.groups)),
        *(
            f"{layer}.{group}.{name}"
            for layer in shape.experts.layers
            for group in range(shape.experts.groups)
            for name in ("gate", "up", "down")
        ),
    }
    tiles = sum(packed[name].value.numel() for name in changed)
    assert shape.weight_bytes(some) - shape.weight_bytes(all_packed) == tiles * (2 - 17 / 16)


def test_interrupted_cache_is_not_used(tmp_path: Path) -> None:
    hf = random_model("llama")
    shape, cache = ModelShape.of(hf.config), WeightCache(tmp_path)
    with opened() as card:
        Weights(shape, card, cache, WeightFormats()).load(hf.state_dict().items())
        sorted(tmp_path.iterdir())[0].unlink()
        assert not Weights(shape, card, cache, WeightFormats()).load_cached()


def test_missing_tensor_is_named() -> None:
    hf = random_model("qwen3")
    named = [pair for pair in hf.state_dict().items() if pair[0] != "model.norm.weight"]
    with opened() as card, pytest.raises(ValueError, match=r"has no model\.norm\.weight"):
        Weights(ModelShape.of(hf.config), card, None, WeightFormats()).load(named)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_of_a_checkpoint_is_used(kind: str, tied: bool) -> None:
    """What transformers saves is what the pieces are made of, shapes included."""
    hf = random_model(kind, tied=tied)
    shape = ModelShape.of(hf.config)
    shapes = {name: tuple(x.shape) for name, x in saved(hf).items()}
    if tied:
        shapes.pop("lm_head.weight")
    assert source_shapes(shape) == shapes
    assert {source for piece in pieces(shape, 1) for source in piece.sources} == shapes.keys()


ODD_TENSORS = {
    "a bias": ("model.layers.1.self_attn.o_proj.bias", (256,), "there is none"),
    "another layer": ("model.layers.2.mlp.up_proj.weight", (512, 256), "num_hidden_layers = 2,"),
    "another kind of norm": ("model.layers.0.pre_feedforward_layernorm.weight", (256,), "no use"),
    "another head": ("lm_head.bias", (512,), "has no use"),
    "one of another shape": ("model.norm.weight", (128,), r"is \[128\], and .* \[256\]"),
}


@pytest.mark.parametrize("odd", ODD_TENSORS)
def test_a_tensor_without_a_use_is_refused(odd: str, tmp_path: Path) -> None:
    """Left out in silence, as it was, it makes another model; and the cache is not used then."""
    name, size, words = ODD_TENSORS[odd]
    hf, cache = random_model("qwen3"), WeightCache(tmp_path)
    named = hf.state_dict() | {name: torch.zeros(size)}
    shape = ModelShape.of(hf.config)
    with opened() as card:
        with pytest.raises(ValueError, match=words) as raised:
            Weights(shape, card, cache, WeightFormats()).load(named.items())
        assert name in str(raised.value) and "\n" not in str(raised.value)
        assert not Weights(shape, card, cache, WeightFormats()).load_cached()


def test_what_a_checkpoint_may_have_beside_it() -> None:
    hf = random_model("llama", tied=True)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(32) for i in (0, 1)}
    named = hf.state_dict() | tables | {"lm_head.weight": hf.lm_head.weight.detach()}
    with opened() as card:
        Weights(ModelShape.of(hf.config), card, None, WeightFormats()).load(named.items())


def test_changed_checkpoint_has_another_cache(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    file.write_bytes(b"two")
    assert fingerprint(tmp_path) != before


def test_checkpoint_of_a_hub_is_found(tmp_path: Path) -> None:
    """In the hub library's own layout: a reference names a commit, whose files are links."""
    repo, commit = tmp_path / "models--some--model", "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "one").write_bytes(b"weights")
    (repo / "snapshots" / commit / "model.safetensors").symlink_to("../../blobs/one")
    found = checkpoint_folder("some/model", None, str(tmp_path))
    assert found == repo / "snapshots" / commit
    assert checkpoint_folder(str(found), None, None) == found
    before = fingerprint(found)
    (repo / "blobs" / "one").write_bytes(b"other weights")
    assert fingerprint(found) != before
    assert checkpoint_folder("some/other", None, str(tmp_path)) is None
    assert checkpoint_folder("no name/at all/", None, str(tmp_path)) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM has no"),
        ({"head_dim": 96}, "head_dim is 96"),
        ({"intermediate_size": 500}, "intermediate size is 500"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"num_key_value_heads": 1}, "kv_heads of the model are 1, which 2 chips"),
        ({"intermediate_size": 96}, "intermediate of the model are 96"),
        ({"use_sliding_window": True}, "use_sliding_window is set"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"embedding_multiplier": 12.0}, "has embedding_multiplier = 12.0"),
        ({"residual_multiplier": 0.22}, "has residual_multiplier"),
        ({"final_logit_softcapping": 30.0}, "has final_logit_softcapping"),
        ({"query_pre_attn_scalar": 256}, "has query_pre_attn_scalar"),
        ({"clip_qkv": 8.0}, "has clip_qkv"),
        ({"use_qk_norm": True}, "has use_qk_norm"),
        ({"no_rope_layers": [1, 0]}, "has no_rope_layers"),
    ],
)
def test_models_without_a_runtime_are_refused(change: dict[str, object], word: str) -> None:
    config = random_model("llama").config
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModel, match=word):
        check_fields(config)
        ModelShape.of(config).split(2)


@pytest.mark.parametrize(
    ("there", "asked", "word"), [([], 0, "no Tenstorrent card"), ([0, 1], 3, "has cards 0, 1")]
)
def test_missing_cards_are_named(
    monkeypatch: pytest.MonkeyPatch, there: list[int], asked: int, word: str
) -> None:
    monkeypatch.delenv("TT_METAL_SIMULATOR")
    monkeypatch.setattr(cards, "visible_cards", lambda: there)
    with pytest.raises(CardError, match=word):
        open_card([asked])
