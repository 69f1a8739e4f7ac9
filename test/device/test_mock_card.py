"""Real ttnn accepts the runtime's calls; programs are used again; memory is as predicted."""

import json
import os
import secrets
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .mock_card import environment

pytestmark = pytest.mark.skipif(
    find_spec("ttnn") is None,
    reason="ttnn is not installed: it is part of requirements/cpu.txt",
)


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
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "test.device.mock_session",
            kind,
            *map(str, (head_dim, chips, seed)),
        ],
        env=os.environ | environment(tmp_path, chips, arch),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["arch"], seen["chips"]) == (arch, chips)
    assert seen["layers"] == [0, 1]
    assert seen["same_bytes"]
    assert abs(seen["predicted"] - seen["taken"]) <= 0.05 * seen["taken"], seen
    assert seen["needless"] == [], "compiled again for a shape it had"
