"""Warp instructions that the Triton decode kernel executes for a BFP8 page, counted in its machine
code; needs no GPU.

A page is 32 tokens of one KV head, K and V, with up to 8 of its query heads. Counted is the
shortest way around the kernel's loop that multiplies a whole page, and that is all of it: the page
is looked up, its tokens are compared with what the request sees, and what has been added up so far
is scaled, in every round. What stands outside the loop (queries are loaded, the state is stored) is
not counted, nor the loop over BF16 pages.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import triton

from benchmark.common import Figure, finish, parser, table
from benchmark.kernels.machine_code import Flow, by_kind
from benchmark.kernels.triton_code import Compiled, decode_kernel
from hma_kernels.layout import PAGE, TILE, TILE_BYTES
from hma_kernels.triton import decode

# Of sm_90 at head dim 128 and 4 query heads a KV head: half as many again as the CUDA kernel's bar
# was when this one was set.
BAR, BAR_ARCHITECTURE, BAR_HEAD_DIM, BAR_GQA = 1150, 90, 128, 4
WARP_SIZE = 32
M, N, K = 16, 8, 16  # of a tensor core operation


def work_of_a_page(architecture: int, head_dim: int, heads: int) -> dict[str, int]:
    """How many instructions of these names a BFP8 page needs, whatever the compiler does.

    heads: of one program; products have two columns a head. Multiplications of bfloat16 pairs, one
    for two bytes and for two weights in each tile of V, are only in the loop over BFP8 pages.
    """
    tiles, columns = 2 * head_dim // TILE, 2 * heads
    products = (TILE // M) * (PAGE // K) * (columns // N)
    pairs = tiles * TILE * PAGE + tiles // 2 * PAGE * columns
    multiply = "HMUL2" if architecture >= 90 else "HFMA2"
    return {"HMMA": tiles * products, multiply: pairs // 2 // WARP_SIZE}


def count(compiled: Compiled, work: Mapping[str, int]) -> dict[str, Any]:
    """Instructions a page, by class and by name."""
    loop = Flow(compiled.code).shortest_loop(work)
    return {
        "kinds": by_kind(loop),
        "names": dict(Counter(each.name for each in loop).most_common()),
        "total": len(loop),
        "registers": compiled.registers,
        "spilled": compiled.spilled,
        "triton": triton.__version__,
    }


def main() -> None:
    options = parser(__doc__ or "", timed=False)
    options.add_argument("--architectures", type=int, nargs="+", default=[80, 90, 100])
    options.add_argument("--head-dim", type=int, default=BAR_HEAD_DIM)
    options.add_argument("--gqa", type=int, default=BAR_GQA, help="query heads of a KV head")
    args = options.parse_args()
    size = 2 * args.head_dim // TILE * TILE_BYTES
    results, figures = {}, []
    for architecture in args.architectures:
        compiled = decode_kernel(architecture, args.head_dim, args.gqa)
        heads = decode.heads_of_program(args.head_dim, args.head_dim, args.gqa, torch.bfloat16)
        found = count(compiled, work_of_a_page(architecture, args.head_dim, heads))
        name = f"sm_{architecture}, head dim {args.head_dim}, {args.gqa} query heads a KV head"
        results[name] = found | {"bytes": size}
        rows = [[kind, str(number)] for kind, number in found["kinds"].items()]
        lanes = found["total"] * WARP_SIZE / size
        rows += [["in all", str(found["total"])], ["lane operations a byte", f"{lanes:.2f}"]]
        table(f"{name}: {size} B, {compiled}", ["warp instructions", "a page"], rows)
        figures.append(Figure(f"{name}: bytes spilled", found["spilled"], 0, False))
        if (architecture, args.head_dim, args.gqa) == (BAR_ARCHITECTURE, BAR_HEAD_DIM, BAR_GQA):
            figures.append(Figure(f"{name}: warp instructions", found["total"], BAR, False))
    finish(args, {"results": results}, figures)


if __name__ == "__main__":
    main()
