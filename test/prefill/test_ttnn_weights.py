"""Weights from a checkpoint and from the cache on disk, on the stand-in for ttnn."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_hma.prefill.ttnn import card as cards
from sglang_hma.prefill.ttnn.card import CardError, open_card, opened
from sglang_hma.prefill.ttnn.shape import ModelShape, UnsupportedModel
from sglang_hma.prefill.ttnn.weights import WeightCache, Weights, fingerprint

from .models import random_model

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("qwen2", False), ("llama", False)])
def test_second_start_reads_the_cache_alone(
    rng: np.random.Generator, tmp_path: Path, kind: str, tied: bool
) -> None:
    hf = random_model(kind, tied=tied)
    shape, cache = ModelShape.of(hf.config), WeightCache(tmp_path)
    with opened() as card:
        first = Weights(shape, card.device, cache, bfp8=True)
        assert not first.load_cached()
        named = list(hf.state_dict().items())
        first.load(named[i] for i in rng.permutation(len(named)))
        second = Weights(shape, card.device, cache, bfp8=True)
        assert second.load_cached()
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.value, second[name].value)
        assert tensor.dtype == second[name].dtype and tensor.layout == second[name].layout
    assert not [file for file in tmp_path.iterdir() if str(os.getpid()) in file.name]


def test_interrupted_cache_is_not_used(tmp_path: Path) -> None:
    hf = random_model("llama")
    shape, cache = ModelShape.of(hf.config), WeightCache(tmp_path)
    with opened() as card:
        Weights(shape, card.device, cache, bfp8=True).load(hf.state_dict().items())
        sorted(tmp_path.iterdir())[0].unlink()
        assert not Weights(shape, card.device, cache, bfp8=True).load_cached()


def test_missing_tensor_is_named() -> None:
    hf = random_model("qwen3")
    named = [pair for pair in hf.state_dict().items() if pair[0] != "model.norm.weight"]
    with opened() as card, pytest.raises(ValueError, match=r"has no model\.norm\.weight"):
        Weights(ModelShape.of(hf.config), card.device, None, bfp8=True).load(named)


def test_changed_checkpoint_has_another_cache(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    file.write_bytes(b"two")
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM has no"),
        ({"head_dim": 96}, "head_dim is 96"),
        ({"intermediate_size": 500}, "intermediate size is 500"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    ],
)
def test_models_without_a_runtime_are_refused(change: dict[str, object], word: str) -> None:
    config = random_model("llama").config
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModel, match=word):
        ModelShape.of(config)


@pytest.mark.parametrize(
    ("there", "asked", "word"), [([], 0, "no Tenstorrent card"), ([0, 1], 3, "has cards 0, 1")]
)
def test_missing_cards_are_named(
    monkeypatch: pytest.MonkeyPatch, there: list[int], asked: int, word: str
) -> None:
    monkeypatch.delenv("TT_METAL_SIMULATOR")
    monkeypatch.setattr(cards, "visible_cards", lambda: there)
    with pytest.raises(CardError, match=word):
        open_card(asked)
