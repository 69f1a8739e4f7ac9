"""What sass and sass_triton share: instructions a BFP8 page, in a table and held to a bar."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from benchmark.common import Figure, finish, parser, table
from benchmark.kernels.machine_code import Instruction, by_kind
from hma_kernels.layout import TILE, TILE_BYTES

# What the bars are for: sm_90, and 4 query heads of 128 dims a KV head.
BAR_ARCHITECTURE, BAR_HEAD_DIM, BAR_GQA = 90, 128, 4
WARP_SIZE = 32


def counted(loop: Sequence[Instruction], seldom: float = 0.0) -> dict[str, Any]:
    """Of a loop's way around, by class and by name. seldom: instructions that are not in it, a page
    in the mean."""
    return {
        "kinds": by_kind(loop),
        "names": dict(Counter(each.name for each in loop).most_common()),
        "seldom": seldom,
        "total": len(loop) + seldom,
    }


def report(description: str, bar: int, count: Callable[[int, int, int], dict[str, Any]]) -> None:
    """The command line. count(architecture, head_dim, query heads a KV head) gives what `counted`
    does, and "spilled", bytes of a thread, if it knows."""
    options = parser(description, timed=False)
    options.add_argument("--architectures", type=int, nargs="+", default=[80, 90, 100])
    options.add_argument("--head-dim", type=int, default=BAR_HEAD_DIM)
    options.add_argument("--gqa", type=int, default=BAR_GQA, help="query heads of a KV head")
    args = options.parse_args()
    size = 2 * args.head_dim // TILE * TILE_BYTES
    results, figures = {}, []
    for architecture in args.architectures:
        found = count(architecture, args.head_dim, args.gqa)
        name = f"sm_{architecture}, head dim {args.head_dim}, {args.gqa} query heads a KV head"
        results[name] = found | {"bytes": size}
        rows = [[kind, str(number)] for kind, number in found["kinds"].items()]
        if found["seldom"]:
            rows.append(["seldom, in the mean", f"{found['seldom']:.1f}"])
        lanes = found["total"] * WARP_SIZE / size
        rows += [["in all", f"{found['total']:.1f}"], ["lane operations a byte", f"{lanes:.2f}"]]
        table(f"{name}: {size} B", ["warp instructions", "a page"], rows)
        if "spilled" in found:
            figures.append(Figure(f"{name}: bytes spilled", found["spilled"], 0, False))
        if (architecture, args.head_dim, args.gqa) == (BAR_ARCHITECTURE, BAR_HEAD_DIM, BAR_GQA):
            figures.append(Figure(f"{name}: warp instructions", found["total"], bar, False))
    finish(args, {"results": results}, figures)
