"""The Triton decode kernel's PTX, run lane by lane in numpy, against float64: what the interpreter
does not see, which is where the compiler puts tensors and what inline assembly makes of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "run_ptx.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "gqa_group_size", "dtype", "cap", "window"),
    [
        ((128, 128), 4, "bfloat16", 0, -1),
        ((128, 64), 8, "bfloat16", 0, 40),
        ((96, 96), 5, "float16", 30, -1),
        ((64, 256), 9, "float16", 0, 17),
    ],
)
def test_ptx_of_an_instance(
    rng: np.random.Generator,
    tmp_path: Path,
    dims: tuple[int, int],
    gqa_group_size: int,
    dtype: str,
    cap: int,
    window: int,
) -> None:
    # In a process of its own: here kernels may be interpreted.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    values = [rng.integers(2**32), *dims, gqa_group_size, dtype, cap, window]
    command = [sys.executable, str(SCRIPT), *map(str, values)]
    print(command)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
