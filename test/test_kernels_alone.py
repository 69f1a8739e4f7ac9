"""hma_kernels runs with numpy and torch alone."""

import os
import subprocess
import sys
from pathlib import Path

import hma_kernels

ALONE = """
import pkgutil, sys
import importlib

for name in ("sglang", "sglang_hma", "transformers", "flashinfer", "sgl_kernel"):
    sys.modules[name] = None  # importing it fails
import torch
import hma_kernels

for module in pkgutil.walk_packages(hma_kernels.__path__, "hma_kernels."):
    importlib.import_module(module.name)
x = torch.randn(3, 64, 128).bfloat16()
packed = hma_kernels.bfp8_pack(x, rounding="device")
print(torch.equal(hma_kernels.bfp8_unpack(packed), hma_kernels.bfp8_round(x)))
"""


def test_needs_only_torch_and_triton() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(hma_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", ALONE], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr[-2000:]
