"""The tool that compares a card with the reference, on the stand-in for ttnn."""

import json
from pathlib import Path

import pytest

from sglang_hma.prefill.ttnn import compare

from .models import random_model


@pytest.mark.usefixtures("stand_in", "rng")
def test_small_differences_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_model("qwen3").bfloat16().save_pretrained(tmp_path / "model")
    figures = tmp_path / "figures.json"
    assert compare.main(["--model-path", str(tmp_path / "model"), "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert [(one["layer"], one["what"]) for one in found] == [
        *((layer, what) for layer in (0, 1) for what in "KV"),
        (-1, "logits"),
    ]
    assert all(one["correlation"] > 0.999 for one in found)
    # Layer 0 sees the same embeddings: few values are rounded to another byte.
    assert found[0]["differing_bytes"] < 0.25
    assert "logits" in capsys.readouterr().out


@pytest.mark.usefixtures("stand_in")
def test_without_a_card_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TT_METAL_SIMULATOR")
    monkeypatch.setattr("sglang_hma.prefill.ttnn.card.visible_cards", list)
    random_model("llama").bfloat16().save_pretrained(tmp_path)
    assert compare.main(["--model-path", str(tmp_path)]) == 2
    assert "no Tenstorrent card" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--tokens", "0"], ["--chunk", "33"], ["--chunk", "0"]])
def test_impossible_lengths_are_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--model-path", "x", *flags])
    assert "--chunk" in capsys.readouterr().err
