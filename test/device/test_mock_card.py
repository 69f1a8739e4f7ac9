"""Real ttnn accepts the runtime's calls; programs are used again; memory is as predicted."""

import functools
import importlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmark.tenstorrent.module import recording

from .mock_card import environment
from .mock_results import results

pytestmark = pytest.mark.skipif(
    find_spec("ttnn") is None,
    reason="ttnn is not installed: it is part of requirements/cpu.txt",
)


QWEN3_32B, WIDE = "widths:5120,64,8,25600", "widths:8192,64,8,4096"

# (arch, chips): what one process runs there. Importing ttnn takes longer than a run.
RUNS = {
    ("blackhole", 1): ("qwen3:128", "qwen2:64", "mistral:128", "phi3:64", "qwen3_moe:64"),
    ("blackhole", 2): ("qwen3:64", "qwen3_moe, some dense:64"),
    ("blackhole", 4): ("qwen2:64", WIDE),
    ("wormhole_b0", 1): ("llama:64", QWEN3_32B),
}
CASES = [(*where, run) for where, runs in RUNS.items() for run in runs]
WIDTHS = [case for case in CASES if case[2].startswith("widths")]
MODELS = [case for case in CASES if case not in WIDTHS]

OnDescribed = Callable[[str, int, str], Any]


@pytest.fixture(scope="module")
def on_described(tmp_path_factory: pytest.TempPathFactory) -> OnDescribed:
    """What a run on described cards prints, as JSON. Those of one (arch, chips) share a process."""
    seed = secrets.randbits(32)

    @functools.cache
    def process(arch: str, chips: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "test.device.mock_session", str(chips), str(seed)]
        return subprocess.run(
            [*command, *RUNS[arch, chips]],
            env=os.environ | environment(tmp_path_factory.mktemp("cards"), chips, arch),
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )

    def printed(arch: str, chips: int, run: str) -> Any:
        print(f"seed {seed}")
        done, place = process(arch, chips), RUNS[arch, chips].index(run)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return json.loads(done.stdout.splitlines()[place])

    return printed


@pytest.mark.parametrize(("arch", "chips", "run"), MODELS)
def test_real_ttnn_takes_every_call(
    on_described: OnDescribed, arch: str, chips: int, run: str
) -> None:
    seen = on_described(arch, chips, run)
    assert (seen["arch"], seen["chips"]) == (arch, chips)
    assert seen["layers"] == [0, 1]
    assert seen["same_bytes"]
    assert abs(seen["predicted"] - seen["taken"]) <= 0.05 * seen["taken"], seen
    assert seen["programs_after_start"] == 0, "something was compiled for a batch"


@pytest.mark.parametrize(("arch", "chips", "run"), WIDTHS)
def test_operations_fit_a_core_at_published_widths(
    on_described: OnDescribed, arch: str, chips: int, run: str
) -> None:
    """Up to 8,192 tokens after 24,576."""
    assert len(on_described(arch, chips, run)) == 6


def test_the_cost_models_recorder_gives_back_what_ttnn_does(tmp_path: Path) -> None:
    """Shapes, types, layouts, memory, and how many programs each operation needs."""
    done = subprocess.run(
        [sys.executable, "-m", "test.device.mock_results"],
        env=os.environ | environment(tmp_path),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    by_ttnn = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    with recording():
        ttnn = importlib.import_module("ttnn")
        recorded = json.loads(json.dumps(results(ttnn, ttnn.open_device(0))))
    assert len(recorded) > 40
    for expected, found in zip(by_ttnn, recorded, strict=True):
        assert found == expected
