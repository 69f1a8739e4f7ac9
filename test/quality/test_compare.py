"""The whole command on a model that has just been made."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmark.quality import compare
from sglang_hma.demo.random_model import make_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_random_model(folder / "qwen3", layers=2, hidden=128, heads=2, kv_heads=1, vocab=600)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    compare.main()


@pytest.mark.parametrize("chosen", compare.SETS)
def test_every_policy_is_scored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "plot.svg"
    asked = ["--model", model, "--set", chosen, "--documents", 2, "--scored", 20]
    asked += ["--context", 32, 96, "--json", report, "--plot", picture]
    run(monkeypatch, *asked)
    found = json.loads(report.read_text())
    assert picture.stat().st_size > 0
    names = {"BF16", *(policy.name for policy in compare.SETS[chosen])}
    assert found["contexts"].keys() == {"32", "96"}
    for by_policy in found["contexts"].values():
        assert by_policy.keys() == names
        for name, result in by_policy.items():
            assert result["tokens"] == 40
            assert (result["kl"][0] == 0) == (name == "BF16"), name
            assert result["perplexity"] > 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--context", "40"], "--context has 40: needs a multiple of 32"),
        (["--context", "4096", "--scored", "64"], "the model reads 4096"),
        (["--documents", "1"], "--documents is 1: needs at least 2"),
        (["--model", "nothing"], "no model is there"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: list[str],
    words: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--model", model, *asked)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_no_floor_is_nothing_to_measure_by() -> None:
    """Where the few tokens of both agree, as in one Python's text and not in another's."""
    ours = SimpleNamespace(perplexity_change=(0, 0, 0), disagreement=(0.1, 0, 1), kl=(0.1, 0, 1))
    floor = SimpleNamespace(disagreement=(0.0, 0.0, 0.0), kl=(0.05, 0, 1))
    found = compare.figures({compare.OURS.name: ours, compare.FLOAT32.name: floor}, "")
    assert {figure.name: figure.value for figure in found}["KL of ours by the noise floor"] == 2
    assert not any("top-1" in figure.name for figure in found)
