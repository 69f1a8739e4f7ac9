"""Compiles the decode kernel in advance, for the shapes that common models have: `make cubins`.

    python -m hma_kernels.cuda.cubins [--jobs N]    compile what is missing, delete what is stale
    python -m hma_kernels.cuda.cubins --state       say what a wheel built now would carry
    python -m hma_kernels.cuda.cubins --spills      compile every shape, and keep nothing

A kernel whose registers spill is an error. Without nvcc it says so in one line and succeeds: a host
compiles for itself then.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
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
from hma_kernels.cuda.decode import MAX_DIM, instance_for, stages_on
from hma_kernels.layout import TILE


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


# What a model may have: instances differ by the multiple of 32 and by one tile of heads or two.
EVERY_HEAD_DIM = range(32, MAX_DIM + 1, TILE)
EVERY_SHAPE = tuple(
    Shape(head_dim, gqa_group_size, dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for head_dim in EVERY_HEAD_DIM
    for gqa_group_size in (ONE_TILE, TWO_TILES)
)


def instances(shapes: Iterable[Shape]) -> Iterator[tuple[Instance, int]]:
    """Of each architecture, and its number; each once."""
    for architecture in prebuilt.ARCHITECTURES:
        stages = stages_on(architecture // 10)
        made = (
            instance_for(
                each.head_dim, each.head_dim, each.gqa_group_size, each.dtype, stages=stages
            )
            for each in shapes
        )
        yield from ((instance, architecture) for instance in dict.fromkeys(made))


def wanted() -> dict[Path, tuple[Instance, int]]:
    """Each library's place, instance and architecture."""
    return {prebuilt.path_of(*each): each for each in instances(SHAPES)}


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
    parser.add_argument("--spills", action="store_true", help="fail if registers of one spill")
    args = parser.parse_args()
    nvcc, began = find_nvcc(), time.monotonic()
    if args.state or nvcc is None:
        print(state() if args.state else "cubins: no nvcc in CUDA_HOME, PATH or NVIDIA's wheels")
        return
    if args.spills:
        every = list(instances(EVERY_SHAPE))
        with tempfile.TemporaryDirectory() as folder:
            compile_all(
                {Path(folder, f"{i}.so"): of for i, of in enumerate(every)}, nvcc, args.jobs
            )
        print(f"cubins: {len(every)} compiled, no registers spilled")
        return
    current = wanted()
    delete_others(current)
    missing = {path: of for path, of in current.items() if not path.exists()}
    compile_all(missing, nvcc, args.jobs)
    seconds = time.monotonic() - began
    print(f"cubins: {len(missing)} compiled in {seconds:.0f} s, {args.jobs} at a time; {state()}")


def compile_all(missing: Mapping[Path, tuple[Instance, int]], nvcc: str, jobs: int) -> None:
    """Raises RuntimeError, for registers that spill too."""
    with ThreadPoolExecutor(jobs) as pool:
        started = [
            pool.submit(compile_into, path, nvcc, *of, *NO_SPILLS) for path, of in missing.items()
        ]
        for job in started:
            job.result()


if __name__ == "__main__":
    main()
