"""What check_env says of this box, and of others."""

import copy
import json
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

from sglang_hma import check_env
from sglang_hma.prefill.ttnn.card import why_no_ttnn


@pytest.fixture(scope="module")
def box() -> dict[str, Any]:
    return check_env.look()


def test_json_is_what_was_seen() -> None:
    command = [sys.executable, "-m", "sglang_hma.check_env", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert seen["packages"]["torch"] == version("torch")
    assert seen["missing"]["cpu"] == []


def test_tables_name_what_is_missing(
    box: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    check_env.show(box)
    text = " ".join(capsys.readouterr().out.split())
    assert "prefill and decode on the CPU" in text and box["cpu"]["kernels"].split()[0] in text


@pytest.mark.parametrize(
    ("change", "device", "word"),
    [
        ({"packages": {"sglang": "0.5.1"}}, "cpu", "needs 0.5.23"),
        ({"packages": {"torch": None}}, "cpu", "torch is not installed"),
        ({"gpus": []}, "gpu", "sees no GPU"),
        ({"tenstorrent": {"cards": [], "stands_in": False}}, "tenstorrent", "tt-kmd"),
        ({"tenstorrent": {"compiler": None}}, "tenstorrent", "sfpi"),
        ({"packages": {"ttnn": None}}, "tenstorrent", "make venv"),
    ],
)
def test_what_is_missing_is_named(
    box: dict[str, Any], change: dict[str, Any], device: str, word: str
) -> None:
    other = copy.deepcopy(box)
    for part, values in change.items():
        other[part] = other[part] | values if isinstance(values, dict) else values
    assert any(word in lacks for lacks in check_env.missing(other)[device])


@pytest.mark.parametrize(
    ("python", "remedy"),
    [
        ((3, 11), "ttnn has no wheel for Python 3.11: make venv PYTHON=3.12"),
        ((3, 12), "ttnn is not installed: make venv"),
        ((3, 13), "ttnn has no wheel for Python 3.13: make venv PYTHON=3.12"),
    ],
)
def test_a_python_without_ttnn_is_told_which_one_has_it(
    python: tuple[int, int], remedy: str
) -> None:
    assert why_no_ttnn(python) == remedy


def test_a_box_with_a_card_can_prefill_on_it(box: dict[str, Any]) -> None:
    other = copy.deepcopy(box)
    other["packages"]["ttnn"] = "0.81.1"
    other["tenstorrent"] = {"cards": [0], "stands_in": False, "driver": "2.0", "compiler": "/x"}
    assert check_env.missing(other)["tenstorrent"] == []
