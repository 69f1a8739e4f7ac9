"""Every Triton kernel compiles to machine code for the GPUs that it is meant for, without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["90"])
def test_kernels_compile(architecture: str, tmp_path: Path) -> None:
    # In a process of its own: here kernels may be interpreted.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), architecture], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert done.stdout.count(f"sm_{architecture} ") == 7
