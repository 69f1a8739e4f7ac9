"""Warp instructions that the CUDA decode kernel executes for a BFP8 page, counted in its machine
code; needs nvcc, no GPU.

A page is 32 tokens of one KV head, K and V. Counted is the way around the kernel's loop that
multiplies one whole page and asks for another.
What happens more seldom (the next 32 pages are looked up, a maximum rises, another request begins)
is not in it, except for the look-up, a 32nd of which is added.
"""

import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from benchmark.common import Figure, finish, parser, table
from benchmark.kernels.machine_code import Flow, by_kind, disassemble
from hma_kernels.cuda.build import Instance, command, find_nvcc
from hma_kernels.cuda.decode import instance_for, stages_on
from hma_kernels.layout import GROUP, PAGE, TILE, TILE_BYTES

KERNEL = "hma_decode_kernel"
# Of sm_90 at head dim 128 and 4 query heads a KV head.
BAR, BAR_ARCHITECTURE, BAR_HEAD_DIM, BAR_GQA = 780, 90, 128, 4
WARP_SIZE, COPY_BYTES = 32, 16
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


def count(nvcc: str, instance: Instance, architecture: int) -> dict[str, Any]:
    """Instructions a page, by class and by name. Raises CalledProcessError if nvcc fails."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "decode.so")
        subprocess.run(command(nvcc, instance, architecture, library), check=True)
        functions = disassemble(knobs.nvidia.cuobjdump.path, library)
    code = next(code for name, code in functions.items() if KERNEL in name)
    flow, work = Flow(code), work_of_a_page(instance)
    loop = flow.shortest_loop(work)
    looking_up = flow.shortest_loop(work | {"LDG": 2})  # the page and its position
    extra = (len(looking_up) - len(loop)) / PAGES_LOOKED_UP
    return {
        "kinds": by_kind(loop),
        "names": dict(Counter(each.name for each in loop).most_common()),
        "look_up": extra,
        "total": len(loop) + extra,
    }


def show(title: str, found: Mapping[str, Any], size: int) -> None:
    lanes = found["total"] * WARP_SIZE / size
    rows = [[kind, str(number)] for kind, number in found["kinds"].items()]
    rows += [["a 32nd of a look-up", f"{found['look_up']:.1f}"]]
    rows += [["in all", f"{found['total']:.1f}"], ["lane operations a byte", f"{lanes:.2f}"]]
    table(title, ["warp instructions", "a page"], rows)


def main() -> None:
    options = parser(__doc__ or "", timed=False)
    options.add_argument("--architectures", type=int, nargs="+", default=[80, 90, 100])
    options.add_argument("--head-dim", type=int, default=BAR_HEAD_DIM)
    options.add_argument("--gqa", type=int, default=BAR_GQA, help="query heads of a KV head")
    args = options.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        options.error("no nvcc in CUDA_HOME, PATH or NVIDIA's wheels: install CUDA's compiler")
    size = 2 * args.head_dim // TILE * TILE_BYTES
    results, figures = {}, []
    for architecture in args.architectures:
        instance = instance_for(
            *(args.head_dim, args.head_dim, args.gqa, torch.bfloat16),
            stages=stages_on(architecture // 10),
        )
        found = count(nvcc, instance, architecture)
        name = f"sm_{architecture}, head dim {args.head_dim}, {args.gqa} query heads a KV head"
        results[name] = found | {"bytes": size}
        show(f"{name}: {size} B", found, size)
        if (architecture, args.head_dim, args.gqa) == (BAR_ARCHITECTURE, BAR_HEAD_DIM, BAR_GQA):
            figures.append(Figure(f"{name}: warp instructions", found["total"], BAR, False))
    finish(args, {"results": results}, figures)


if __name__ == "__main__":
    main()
