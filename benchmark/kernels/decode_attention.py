"""Paged BFP8 decode attention beside torch and SGLang's torch_native backend.

Peers read BF16: `sdpa` is torch's scaled_dot_product_attention(enable_gqa) on KV that is already
contiguous for each request, `torch_native` SGLang's own CPU backend over its token pool. Ours
reads pages in random order. The floor is the BFP8 bytes over the bandwidth of streaming reads that
streaming.py measures, with as many threads and in the same rounds; `of reads` is the share of that
bandwidth that decode attention reaches, and what --check holds it to. `verify n` is a step with n
queries a request, beside n steps with one.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmark.common import Figure, Timing, console, finish, interleave, parser, table
from benchmark.kernels.streaming import BYTES, StreamingRead
from hma_kernels import PAGE, TILE, TILE_BYTES, DecodePlan, PagedKV, PageTable, cpu

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
MAIN, LONG, MANY = "8 x 4096", "1 x 32768", "64 x 1024"
MIXED, EVEN = "1 x 32768 + 31 x 256", "32 x 1272"
SHAPES = {
    MAIN: [4096] * 8,
    LONG: [32768],
    MANY: [1024] * 64,
    MIXED: [32768] + [256] * 31,
    EVEN: [1272] * 32,
}
# The least share of streaming reads.
VERIFY = (4, 8)  # queries a request
MOST_OF_SINGLE_STEPS = 0.9
TARGETS = {"avx512_bf16": 0.60, "avx512": 0.45, "avx2": 0.30}


class Case:
    """A batch with full BFP8 pages in random order, and the same tokens' worth of BF16."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        pages = [-(-length // PAGE) for length in lengths]
        count = sum(pages)
        self.pages = [self._tiles(count), self._tiles(count)]
        bf16 = torch.empty(0, KV_HEADS, PAGE, DIM, dtype=torch.bfloat16)
        nothing = torch.zeros(0, dtype=torch.int64)
        table = PageTable(
            bfp8_indptr=torch.tensor([0, *torch.tensor(pages).cumsum(0).tolist()]),
            bfp8_indices=torch.randperm(count),
            bfp8_pos=torch.cat([torch.arange(n) * PAGE for n in pages]),
            bf16_indptr=torch.zeros(len(lengths) + 1, dtype=torch.int64),
            bf16_indices=nothing,
            bf16_pos=nothing,
            seq_lens=torch.tensor(lengths),
        )
        kv = PagedKV(self.pages[:1], self.pages[1:], [bf16], [bf16])
        self.q = torch.randn(len(lengths), Q_HEADS, DIM, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.plan = lambda q_indptr=None: DecodePlan(
            kv, table, num_q_heads=Q_HEADS, q_indptr=q_indptr
        )

    @staticmethod
    def _tiles(count: int) -> torch.Tensor:
        shape = (count, KV_HEADS, DIM // TILE, TILE_BYTES)
        tiles = torch.randint(0, 256, shape, dtype=torch.uint8)
        tiles[..., :64] = torch.randint(120, 127, (*shape[:-1], 64), dtype=torch.uint8)
        return tiles

    @property
    def bytes(self) -> int:
        """K and V as they lie, by the tokens used."""
        return sum(self.lengths) * KV_HEADS * DIM * 2 * 17 // 16

    def ours(self) -> Callable[[], None]:
        plan = self.plan()

        def run() -> None:
            plan.run(self.q, 0, scale=DIM**-0.5, out=self.out)

        return run

    def verify(self, queries: int) -> Callable[[], None]:
        plan = self.plan(queries * torch.arange(len(self.lengths) + 1))
        q = torch.randn(queries * len(self.lengths), Q_HEADS, DIM, dtype=torch.bfloat16)
        out = torch.empty_like(q)

        def run() -> None:
            plan.run(q, 0, scale=DIM**-0.5, out=out)

        return run

    def sdpa(self) -> Callable[[], None]:
        def rows(n: int) -> torch.Tensor:
            return torch.randn(1, KV_HEADS, n, DIM, dtype=torch.bfloat16)

        kv = [(self.q[i][None, :, None], rows(n), rows(n)) for i, n in enumerate(self.lengths)]
        if len(set(self.lengths)) == 1:  # one call for the whole batch
            q, k, v = (torch.cat(part) for part in zip(*kv, strict=True))
            kv = [(q, k, v)]

        def run() -> None:
            for q, k, v in kv:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return run

    def torch_native(self) -> Callable[[], None]:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
        tokens = sum(self.lengths)
        k, v = (torch.randn(tokens, KV_HEADS, DIM, dtype=torch.bfloat16) for _ in range(2))
        req_to_token = torch.zeros(len(self.lengths), max(self.lengths), dtype=torch.int64)
        start = 0
        for i, n in enumerate(self.lengths):
            req_to_token[i, :n] = torch.arange(start, start + n)
            start += n
        backend = TorchNativeAttnBackend(runner)
        rows, lens = torch.arange(len(self.lengths)), torch.tensor(self.lengths)

        def run() -> None:
            backend._run_sdpa_forward_decode(
                self.q, self.out, k, v, req_to_token, rows, lens,
                scaling=DIM**-0.5, enable_gqa=True,
            )  # fmt: skip

        return run


def set_up(isa: str, threads: int) -> None:
    cpu.set_isa(isa)
    cpu.set_threads(threads)
    torch.set_num_threads(threads)


def compare(
    isa: str, threads: int, rounds: int, cases: dict[str, Case], reader: StreamingRead
) -> dict[str, Any]:
    """All cases and their peers on one instruction set, in the same rounds as the reads."""
    set_up(isa, threads)
    candidates = reader.candidates()
    candidates |= {name: case.ours() for name, case in cases.items()}
    candidates |= {f"sdpa {name}": cases[name].sdpa() for name in (MAIN, LONG, MANY)}
    for name in (MAIN, LONG):
        candidates |= {f"verify {n} {name}": cases[name].verify(n) for n in VERIFY}
    candidates[f"torch_native {MAIN}"] = cases[MAIN].torch_native()
    times = interleave(candidates, rounds)
    read = min(reader.candidates(), key=lambda name: times[name].median)

    def ratio(name: str, peer: str) -> float:
        return times[name].times_faster_than(times[peer])

    result: dict[str, Any] = {
        "isa": isa,
        "threads": threads,
        "read": read,
        "read_bytes_per_s": BYTES / times[read].median,
        "read_spread": times[read].spread,
        "times_torch_native": ratio(MAIN, f"torch_native {MAIN}"),
        "long_of_main": ratio(LONG, MAIN) * cases[LONG].bytes / cases[MAIN].bytes,
        "mixed_over_even": 1 / ratio(MIXED, EVEN) * cases[EVEN].bytes / cases[MIXED].bytes,
        "verify": {
            name: {
                str(n): {
                    "ms": times[f"verify {n} {name}"].median * 1e3,
                    "of_single_steps": 1 / ratio(f"verify {n} {name}", name) / n,
                }
                for n in VERIFY
            }
            for name in (MAIN, LONG)
        },
        "cases": {},
    }
    for name, case in cases.items():
        shares = Timing(
            [
                case.bytes / own / (BYTES / peer)
                for own, peer in zip(times[name].rounds, times[read].rounds, strict=True)
            ]
        )
        result["cases"][name] = {
            "ms": times[name].median * 1e3,
            "spread": times[name].spread,
            "floor_ms": case.bytes / result["read_bytes_per_s"] * 1e3,
            "bytes_per_s": case.bytes / times[name].median,
            "of_read": shares.median,
            "of_read_spread": shares.spread,
        }
        if sdpa := times.get(f"sdpa {name}"):
            result["cases"][name] |= {
                "sdpa_ms": sdpa.median * 1e3,
                "times_sdpa": ratio(name, f"sdpa {name}"),
            }
    return result


def show(result: dict[str, Any]) -> None:
    rows = [
        [
            name,
            f"{case['ms']:.2f} ±{case['spread']:.0%}",
            f"{case['floor_ms']:.2f}",
            f"{case['bytes_per_s'] / 1e9:.2f}",
            f"{case['of_read']:.0%} ±{case['of_read_spread']:.0%}",
            f"{case['sdpa_ms']:.1f}" if "sdpa_ms" in case else "-",
            f"{case['times_sdpa']:.1f}" if "sdpa_ms" in case else "-",
        ]
        for name, case in result["cases"].items()
    ]
    table(
        f"{result['isa']}, {result['threads']} thread(s), {Q_HEADS} query heads, {KV_HEADS} KV "
        f"heads, head_dim {DIM}",
        ["requests x tokens", "ms", "floor", "GB/s of BFP8", "of reads", "sdpa, ms", "sdpa / ours"],
        rows,
    )
    print(
        f"streaming reads: {result['read_bytes_per_s'] / 1e9:.1f} GB/s "
        f"±{result['read_spread']:.0%} ({result['read']}); {MAIN}: "
        f"{result['times_torch_native']:.1f} x torch_native"
    )
    for name, steps in result["verify"].items():
        for n, step in steps.items():
            share = step["of_single_steps"]
            print(f"verify {n}, {name}: {step['ms']:.2f} ms, {share:.0%} of {n} steps")
    print()


def sweep(isa: str, threads: list[int], rounds: int) -> list[dict[str, Any]]:
    """Batch 1-64 at 4,096 and context 128-32k at batch 8, on 1 to all threads."""
    shapes = [(batch, 4096) for batch in (1, 2, 4, 8, 16, 32, 64)]
    shapes += [(8, context) for context in (128, 512, 2048, 8192, 32768)]
    points = []
    for batch, context in shapes:
        console.print(f"decode attention: {batch} x {context}", style="dim")
        case = Case([context] * batch)
        sdpa = case.sdpa() if batch * context <= 1 << 16 else None
        for count in threads:
            set_up(isa, count)
            candidates: dict[str, Callable[[], object]] = {"ours": case.ours()}
            if sdpa:
                candidates["sdpa"] = sdpa
            times: dict[str, Timing] = interleave(candidates, min(rounds, 5))
            point = {"batch": batch, "context": context, "threads": count, "bytes": case.bytes}
            points.append(point | {f"{name}_ms": t.median * 1e3 for name, t in times.items()})
    return points


def plot(path: Path, points: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "hma"
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for ax, along, fixed in (
        (axes[0], "batch", ("context", 4096)),
        (axes[1], "context", ("batch", 8)),
    ):
        for threads in sorted({p["threads"] for p in points}):
            for name, style in (("ours", "-"), ("sdpa", ":")):
                line = sorted(
                    (p[along], p[f"{name}_ms"])
                    for p in points
                    if p[fixed[0]] == fixed[1] and p["threads"] == threads and f"{name}_ms" in p
                )
                label = f"{name}, {threads} thread(s)"
                ax.plot(*zip(*line, strict=True), style, marker="o", markersize=3, label=label)
        ax.set(xscale="log", yscale="log", xlabel=f"{along} ({fixed[0]} {fixed[1]})")
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="ms a layer")
    axes[0].legend(fontsize=8)
    figure.savefig(path)


def figures(results: list[dict[str, Any]]) -> list[Figure]:
    found = []
    for result in results:
        isa = result["isa"]
        if isa in TARGETS:
            found += [
                Figure(
                    f"{name}, {isa}, {result['threads']} threads, of streaming reads",
                    result["cases"][name]["of_read"],
                    TARGETS[isa],
                )
                for name in (MAIN, LONG, MANY)
            ]
    best = results[0]
    return [
        *found,
        Figure(f"{LONG}, {best['isa']}, speed a byte of {MAIN}", best["long_of_main"], 0.9),
        *(
            Figure(
                f"verify {n}, {name}, {best['isa']}, of {n} steps",
                best["verify"][name][str(n)]["of_single_steps"],
                MOST_OF_SINGLE_STEPS,
                False,
            )
            for name in (MAIN, LONG)
            for n in VERIFY
        ),
        Figure(f"{MIXED}, {best['isa']}, time of even", best["mixed_over_even"], 1.15, False),
    ]


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    best, most = cpu.isa(), cpu.threads()
    cases = {name: Case(lengths) for name, lengths in SHAPES.items()}
    reader = StreamingRead(most)
    results = []
    for isa in cpu.available_isas():
        if isa == "scalar" and args.quick:
            continue
        console.print(f"decode attention: {isa}, {most} threads", style="dim")
        results.append(compare(isa, most, args.rounds, cases, reader))
        show(results[-1])
    points = [] if args.quick else sweep(best, sorted({1, most}), args.rounds)
    if args.plot and points:
        plot(args.plot, points)
    set_up(best, most)
    for isa in [isa for isa in TARGETS if isa not in cpu.available_isas()]:
        print(f"skipped: {isa}, of streaming reads: this machine has no {isa}")
    finish(args, {"results": results, "sweep": points}, figures(results))


if __name__ == "__main__":
    main()
