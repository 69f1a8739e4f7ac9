"""The tool that compares a runtime with float32 layer by layer, on the stand-in for ttnn."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from sglang_hma.prefill import compare

from .models import random_model


@pytest.mark.usefixtures("stand_in", "rng")
def test_small_differences_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_model("qwen3").bfloat16().save_pretrained(tmp_path / "model")
    figures = tmp_path / "figures.json"
    asked = ["--model-path", str(tmp_path / "model"), "--json", str(figures)]
    assert compare.main([*asked, "--runtime", "ttnn"]) == 0
    found = json.loads(figures.read_text())
    assert [(one["layer"], one["what"]) for one in found] == [
        *((layer, what) for layer in (0, 1) for what in ("K", "V", "hidden")),
        (-1, "logits"),
    ]
    for one in found:
        errors = one["relative"]
        assert 0 < errors["BF16"] < 0.1 and 0 < errors["formats"] < 0.1
        assert 0 < errors["ttnn"] < 3 * errors["formats"]
    # Layer 0 sees the same embeddings: few values are rounded to another byte.
    assert found[0]["differing_bytes"] < 0.25
    assert "logits" in capsys.readouterr().out


def test_a_layer_that_is_wrong_is_told_by_its_errors(rng: np.random.Generator) -> None:
    """From it on, and not before."""
    model = random_model("llama", layers=3)
    tokens = rng.integers(0, 512, 40)
    truth = compare.by_transformers(model, tokens)
    wrong = copy.deepcopy(model)
    wrong.model.layers[1].self_attn.v_proj.weight.data *= 1.3
    found = compare.compare({"wrong": compare.by_transformers(wrong, tokens)}, truth)
    errors = {(one.layer, one.what): one.relative["wrong"] for one in found}
    right = [key for key, error in errors.items() if error == 0]
    assert right == [(0, "K"), (0, "V"), (0, "hidden"), (1, "K")]
    assert errors[1, "V"] == pytest.approx(0.3, rel=1e-4)


def test_without_a_runtime_it_shows_what_formats_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_model("qwen3").bfloat16().save_pretrained(tmp_path)
    assert compare.main(["--model-path", str(tmp_path), "--tokens", "40"]) == 0
    shown = capsys.readouterr().out
    assert "formats" in shown and "hidden" in shown and "ttnn" not in shown


@pytest.mark.usefixtures("stand_in")
def test_without_a_card_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TT_METAL_SIMULATOR")
    monkeypatch.setattr("sglang_hma.prefill.ttnn.card.visible_cards", list)
    random_model("llama").bfloat16().save_pretrained(tmp_path)
    assert compare.main(["--model-path", str(tmp_path), "--runtime", "ttnn"]) == 2
    assert "no Tenstorrent card" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--tokens", "0"], ["--chunk", "33"], ["--chunk", "0"]])
def test_impossible_lengths_are_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--model-path", "x", *flags])
    assert "--chunk" in capsys.readouterr().err
