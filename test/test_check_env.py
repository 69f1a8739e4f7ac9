"""What check_env says of this box, and of others."""

import copy
import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sglang_hma import check_env
from sglang_hma.prefill.ttnn import host
from sglang_hma.prefill.ttnn.card import why_no_ttnn

NO_PAGES = {"cards": [0], "iommu": False, "huge_pages": 0}
NO_SFPI = {"folder": None, "version": None, "wanted": "7.89.0"}


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
        ({"tenstorrent": {"sfpi": NO_SFPI}}, "tenstorrent", "install sfpi 7.89.0 to /opt"),
        ({"tenstorrent": NO_PAGES}, "tenstorrent", "0 huge pages of 1 GB"),
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
    sfpi = {"folder": "/x", "version": "7.89.0", "wanted": "7.89.0"}
    card = {"cards": [0], "stands_in": False, "driver": "2.0", "firmware": ["18.8.0"]}
    other["tenstorrent"] = card | {"sfpi": sfpi, "huge_pages": 0, "iommu": True}
    assert check_env.missing(other)["tenstorrent"] == []


def ttnn_and_sfpi(folder: Path, says: str | None, wanted: str = "7.89.0") -> tuple[Path, Path]:
    """A package that wants one release, and an installed compiler that says what it is."""
    package, sfpi = folder / "ttnn", folder / "sfpi"
    (package / "tt_metal").mkdir(parents=True)
    (package / "tt_metal/sfpi-version").write_text(f"# release\nsfpi_version='{wanted}'\n")
    sfpi.mkdir()
    if says is not None:
        compiler = sfpi / "compiler/bin/riscv-tt-elf-g++"
        compiler.parent.mkdir(parents=True)
        compiler.write_text(f"#!/bin/sh\necho '{says}'\n")
        compiler.chmod(0o755)
    return package, sfpi


@pytest.mark.parametrize(
    ("says", "trouble"),
    [
        ("riscv-tt-elf-g++ (tenstorrent/sfpi:7.89.0[1050]) 15.1.0", None),
        ("riscv-tt-elf-g++ (tenstorrent/sfpi:7.12.1[1]) 15.1.0", "is sfpi 7.12.1, and ttnn is"),
        ("riscv-tt-elf-g++ (GCC) 15.1.0", "tells its version"),
        (None, "tells its version"),
    ],
)
def test_a_compiler_is_asked_what_it_is(
    tmp_path: Path, says: str | None, trouble: str | None
) -> None:
    """A folder of its name made it usable, whatever was in it."""
    found = host.find_sfpi(*ttnn_and_sfpi(tmp_path, says)).trouble()
    assert found is None if trouble is None else found is not None and trouble in found


def test_no_compiler(tmp_path: Path) -> None:
    package, sfpi = ttnn_and_sfpi(tmp_path, None)
    sfpi.rmdir()
    assert host.find_sfpi(package, sfpi).trouble() is not None
    assert host.find_sfpi(None, sfpi).folder is None


def test_the_release_that_this_ttnn_wants_is_read() -> None:
    package = find_spec("ttnn")
    if package is None or package.origin is None:
        pytest.skip("ttnn is not installed")
    file = Path(package.origin).parent / "tt_metal/sfpi-version"
    wanted = host.wanted_sfpi(file)
    assert wanted is not None and wanted in file.read_text()
