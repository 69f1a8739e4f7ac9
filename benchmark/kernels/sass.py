"""Warp instructions that the CUDA decode kernel executes for a BFP8 page, counted in its machine
code; needs nvcc, no GPU.

A page is 32 tokens of one KV head, K and V. Counted is the way around the kernel's loop that
multiplies one whole page and asks for another. What happens more seldom (the next 32 pages are
looked up, a maximum rises, another request begins) is not in it, except for the look-up, a 32nd of
which is added.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from benchmark.kernels.machine_code import Flow, disassemble
from benchmark.kernels.page_cost import WARP_SIZE, counted, report
from hma_kernels.cuda.build import Instance, command, find_nvcc
from hma_kernels.cuda.decode import instance_for, stages_on
from hma_kernels.layout import GROUP, PAGE, TILE, TILE_BYTES

KERNEL = "hma_decode_kernel"
BAR = 780
COPY_BYTES = 16
BLOCK = 16  # tokens of a tensor core operation
PAGES_LOOKED_UP = 32  # at a time


def work_of_a_page(instance: Instance) -> dict[str, int]:
    """How many instructions of these names a page needs, whatever the compiler does."""
    dims = instance.head_dim, instance.v_head_dim
    groups = sum(dims) // GROUP
    bytes_of = [dim // TILE * TILE_BYTES for dim in dims]
    return {
        "HMMA": groups * (PAGE // BLOCK) * instance.head_tiles,
        "LDSM": groups,
        "LDGSTS": sum(-(-size // (WARP_SIZE * COPY_BYTES)) for size in bytes_of),
    }


def count(architecture: int, head_dim: int, gqa_group_size: int) -> dict[str, Any]:
    """Instructions a page, as page_cost.counted. Raises CalledProcessError if nvcc fails,
    SystemExit without it."""
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("no nvcc in CUDA_HOME, PATH or NVIDIA's wheels: install CUDA's compiler")
    stages = stages_on(architecture // 10)
    instance = instance_for(head_dim, head_dim, gqa_group_size, torch.bfloat16, stages=stages)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "decode.so")
        subprocess.run(command(nvcc, instance, architecture, library), check=True)
        functions = disassemble(knobs.nvidia.cuobjdump.path, library)
    code = next(code for name, code in functions.items() if KERNEL in name)
    flow, work = Flow(code), work_of_a_page(instance)
    loop = flow.shortest_loop(work)
    looking_up = flow.shortest_loop(work | {"LDG": 2})  # the page and its position
    return counted(loop, (len(looking_up) - len(loop)) / PAGES_LOOKED_UP)


if __name__ == "__main__":
    report(__doc__ or "", BAR, count)
