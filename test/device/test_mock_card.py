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


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("card"))


@pytest.mark.parametrize(("kind", "head_dim"), [("qwen3", 128), ("qwen2", 64), ("llama", 64)])
def test_real_ttnn_takes_every_call(card: dict[str, str], kind: str, head_dim: int) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    done = subprocess.run(
        [sys.executable, "-m", "test.device.mock_session", kind, str(head_dim), str(seed)],
        env=os.environ | card,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["arch"] == "blackhole"
    assert seen["layers"] == [0, 1]
    assert seen["same_bytes"]
    assert abs(seen["predicted"] - seen["taken"]) <= 0.05 * seen["taken"], seen
    assert seen["needless"] == [], "compiled again for a shape it had"
