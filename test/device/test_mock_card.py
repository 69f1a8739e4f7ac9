"""Real ttnn accepts the runtime's calls; programs are used again; memory is as predicted."""

import json
import os
import secrets
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from .mock_card import environment

pytestmark = pytest.mark.skipif(
    find_spec("ttnn") is None,
    reason="ttnn is not installed: it is part of requirements/cpu.txt",
)


def on_described(folder: Path, chips: int, arch: str, module: str, *arguments: object) -> Any:
    """What `python -m test.device.MODULE` printed last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", f"test.device.{module}", *map(str, arguments)],
        env=os.environ | environment(folder, chips, arch),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "head_dim", "chips", "arch"),
    [
        ("qwen3", 128, 1, "blackhole"),
        ("qwen2", 64, 1, "blackhole"),
        ("llama", 64, 1, "wormhole_b0"),
        ("qwen3", 64, 2, "blackhole"),
        ("qwen2", 64, 4, "blackhole"),
    ],
)
def test_real_ttnn_takes_every_call(
    tmp_path: Path, kind: str, head_dim: int, chips: int, arch: str
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    seen = on_described(tmp_path, chips, arch, "mock_session", kind, head_dim, chips, seed)
    assert (seen["arch"], seen["chips"]) == (arch, chips)
    assert seen["layers"] == [0, 1]
    assert seen["same_bytes"]
    assert abs(seen["predicted"] - seen["taken"]) <= 0.05 * seen["taken"], seen
    assert seen["needless"] == [], "compiled again for a shape it had"


@pytest.mark.parametrize(
    ("arch", "chips", "widths"),
    [
        pytest.param("wormhole_b0", 1, (5120, 64, 8, 25600), id="Qwen3-32B"),
        pytest.param("blackhole", 4, (8192, 64, 8, 4096), id="hidden 8192, four chips"),
    ],
)
def test_operations_fit_a_core_at_published_widths(
    tmp_path: Path, arch: str, chips: int, widths: tuple[int, ...]
) -> None:
    """Up to 8,192 tokens after 24,576."""
    assert len(on_described(tmp_path, chips, arch, "mock_widths", chips, *widths)) == 6
