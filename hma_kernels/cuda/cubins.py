"""Compiles the decode kernel in advance, for the shapes that common models have: `make cubins`.

    python -m hma_kernels.cuda.cubins [--jobs N]    compile what is missing, delete what is stale
    python -m hma_kernels.cuda.cubins --state       say what a wheel built now would carry

A kernel whose registers spill is an error. Without nvcc it says so in one line and succeeds: a host
compiles for itself then.
"""

import argparse
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from hma_kernels.cuda import prebuilt
from hma_kernels.cuda.build import (
    HEADS_PER_TILE,
    NO_SPILLS,
    Instance,
    compile_into,
    find_nvcc,
)
from hma_kernels.cuda.decode import instance_for, stages_on


@dataclass(frozen=True)
class Shape:
    head_dim: int
    gqa_group_size: int
    dtype: torch.dtype = torch.bfloat16


ONE_TILE, TWO_TILES = HEADS_PER_TILE, 2 * HEADS_PER_TILE  # every group size up to these
SHAPES = (
    Shape(64, ONE_TILE),  # SmolLM2, Qwen2.5 0.5B, Llama 3.2 1B, gpt-oss
    Shape(96, ONE_TILE),  # Phi-3 mini
    Shape(128, ONE_TILE),  # Qwen3 0.6B..32B, Qwen2.5 from 1.5B, Llama 3, Mistral
    Shape(128, TWO_TILES),  # Qwen3 235B and Coder, GLM-4
    Shape(256, ONE_TILE),  # Gemma
    Shape(64, ONE_TILE, torch.float16),
    Shape(128, ONE_TILE, torch.float16),
)


def wanted() -> dict[Path, tuple[Instance, int]]:
    """Each library's place, instance and architecture."""
    found = {}
    for architecture in prebuilt.ARCHITECTURES:
        stages = stages_on(architecture // 10)
        for shape in SHAPES:
            dims = shape.head_dim, shape.head_dim
            instance = instance_for(*dims, shape.gqa_group_size, shape.dtype, stages=stages)
            found[prebuilt.path_of(instance, architecture)] = instance, architecture
    return found


def delete_others(current: Iterable[Path]) -> int:
    """How many libraries that no host would take, being of other sources, were deleted."""
    others = set(prebuilt.folder().glob("*.so")) - set(current)
    for path in others:
        path.unlink()
    return len(others)


def state() -> str:
    """Stale libraries are deleted, so that no wheel carries them."""
    current = wanted()
    stale = delete_others(current)
    there = [path for path in current if path.exists()]
    deleted = f"; {stale} of other sources deleted" if stale else ""
    if not there:
        return f"no prebuilt CUDA kernels: make cubins compiles them, with nvcc{deleted}"
    megabytes = sum(path.stat().st_size for path in there) / 1e6
    return f"{len(there)} of {len(current)} prebuilt CUDA kernels, {megabytes:.0f} MB{deleted}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="nvcc at a time")
    parser.add_argument("--state", action="store_true")
    args = parser.parse_args()
    nvcc, began = find_nvcc(), time.monotonic()
    if args.state or nvcc is None:
        print(state() if args.state else "cubins: no nvcc in CUDA_HOME, PATH or NVIDIA's wheels")
        return
    current = wanted()
    delete_others(current)
    missing = {path: made_of for path, made_of in current.items() if not path.exists()}
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(compile_into, path, nvcc, *of, *NO_SPILLS) for path, of in missing.items()
        ]
        for job in jobs:
            job.result()
    seconds = time.monotonic() - began
    print(f"cubins: {len(missing)} compiled in {seconds:.0f} s, {args.jobs} at a time; {state()}")


if __name__ == "__main__":
    main()
