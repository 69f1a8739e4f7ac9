"""Time to the first token over a link of limited rate: SGLang's PD and sglang-hma's.

Four pairs run side by side in two network namespaces, all with one model and one thread a
server: SGLang 0.5.23 in BF16, which sends after the forward pass; ours in BF16, layer by layer;
ours in BFP8, after the forward pass; ours in BFP8, layer by layer. The link is calibrated so
that SGLang's transfer of the --prompt length takes as long as its prefill; rates are multiples
of that. Needs root.
"""

import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmark.common import Figure, Timing, console, finish, parser, table
from benchmark.transfer.link import Link, run
from benchmark.transfer.pairs import (
    KINDS,
    MODEL,
    Running,
    Wanted,
    answered,
    kv_elements,
    on_a_link,
)
from benchmark.transfer.timeline import COMPUTE, spans

WRITTEN_S = 60.0
ROUND_TRIP_S = 0.001  # the veth pair's own is 0.05 ms; no delay is added


class Bench:
    def __init__(self, pairs: dict[str, Running], road: Link, seed: int) -> None:
        self.pairs = pairs
        self.road = road
        self.rng = random.Random(seed)
        self.asked_s: dict[str, float] = {}  # when each pair got its last prompt

    def prompt(self, tokens: int) -> list[int]:
        return [self.rng.randrange(300, 4000) for _ in range(tokens)]

    def once(self, name: str, tokens: int) -> float:
        prompt = self.prompt(tokens)
        url = self.pairs[name].url
        self.asked_s[name] = time.perf_counter()
        return float(self.road.call(self.road.prefill, lambda: answered(url, prompt, 2)[0]))

    def rounds(self, tokens: int, count: int) -> dict[str, Timing]:
        times: dict[str, list[float]] = {name: [] for name in self.pairs}
        for _ in range(count):
            for name in self.pairs:
                times[name].append(self.once(name, tokens))
        return {name: Timing(values) for name, values in times.items()}

    def duel(self, one: str, other: str, tokens: int, count: int) -> list[float]:
        """Ratios of their TTFT, one a round of one, other, other, one: a drift cancels out."""
        ratios = []
        for _ in range(count):
            a, b, c, d = (self.once(name, tokens) for name in (one, other, other, one))
            ratios.append((a + d) / (b + c))
        return ratios

    def forwards(self, name: str, count: int) -> list[float]:
        """Seconds of the last `count` forward passes of a pair, from its trace. Those of health
        checks, which the router asks for now and then, are a hundredth as long and left out."""
        found: list[float] = []
        for span in self.layers(name):
            if span["name"] == "layer 0":
                found.append(0.0)
            found[-1] += span["dur"] / 1e6
        return [seconds for seconds in found if seconds > 0.1 * max(found)][-count:]

    def layers(self, name: str) -> list[dict[str, Any]]:
        """Of all forward passes, once that of the last prompt is written: once a second is."""
        deadline = time.perf_counter() + WRITTEN_S
        while True:
            found = [s for s in spans(self.pairs[name].trace) if s["tid"] == COMPUTE]
            if found and found[-1]["ts"] / 1e6 > self.asked_s[name]:
                return found
            if time.perf_counter() > deadline:
                raise SystemExit(f"ttft: {self.pairs[name].trace} lacks a forward pass")
            time.sleep(0.1)


def main() -> None:
    options = parser(__doc__ or "")
    options.set_defaults(rounds=5)
    options.add_argument("--prompt", type=int, default=2048, help="tokens the link is fitted to")
    options.add_argument("--port", type=int, default=31600)
    options.add_argument("--keep-trace", type=Path, metavar="FILE", help="keep ours' --hma-trace")
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    run(options, measure)


def measure(args: Any) -> None:
    console.print(f"seed {args.seed}", style="dim")
    wanted = {name: Wanted(name) for name in KINDS}
    with on_a_link(args.port, wanted, ["--disable-radix-cache"]) as (road, pairs):
        report(args, Bench(pairs, road, args.seed))


def report(args: Any, bench: Bench) -> None:
    for name in bench.pairs:
        bench.once(name, args.prompt)  # warm
    fast = bench.rounds(args.prompt, args.rounds)
    matched = kv_elements(args.prompt) * 2 / fast["stock"].median * 8
    results: dict[str, Any] = {"seed": args.seed, "model": MODEL}
    duels = {}
    for tokens, count in ((args.prompt, 6 * args.rounds), (256, 12 * args.rounds)):
        console.print(f"unlimited, layer by layer against after, {tokens} tokens", style="dim")
        duels[tokens] = bench.duel("ours", "after", tokens, count)
    scales = [None, 1.0] if args.quick else [None, 4.0, 2.0, 1.0, 0.5]
    lengths = [args.prompt] if args.quick else [256, 1024, args.prompt, 2 * args.prompt]
    rows: list[list[str]] = []
    records = []
    fitted: dict[str, Timing] = {}
    compute: list[float] = []
    goodput = 0.0
    for scale in scales:
        bench.road.set_rate(matched * scale if scale else None)
        speed = bench.road.goodput(200 if scale is None else min(40, matched * scale / 8e6))
        for tokens in lengths if scale == 1.0 else [args.prompt]:
            console.print(f"rate {scale or 'unlimited'}, {tokens} tokens", style="dim")
            times = (
                fast
                if scale is None and tokens == args.prompt
                else bench.rounds(tokens, args.rounds)
            )
            if scale == 1.0 and tokens == args.prompt:
                fitted, goodput = times, speed
                # Nothing travels during this pair's forward passes: they are compute alone.
                compute = bench.forwards("after", args.rounds)
                if args.keep_trace:
                    bench.once("ours", 1)
                    shutil.copy(bench.pairs["ours"].trace, args.keep_trace)
            rate = "unlimited" if scale is None else f"{speed * 8 / 1e6:.0f} Mbit/s"
            cells = [f"{t.median * 1e3:.0f} ±{t.spread:.0%}" for t in times.values()]
            ratio = 1 / times["ours"].times_faster_than(times["stock"])
            rows.append([f"{tokens} tokens, {rate}", *cells, f"{ratio:.2f}"])
            records.append(
                {
                    "tokens": tokens,
                    "scale": scale,
                    "goodput_bytes_per_s": speed,
                    "ttft_s": {name: t.rounds for name, t in times.items()},
                }
            )
    table(
        f"TTFT in ms; median of {args.rounds} rounds, turn about; ± half the quartiles' range",
        ["prompt, link", *(KINDS[name].title for name in bench.pairs), "ours / stock"],
        rows,
    )
    wire = kv_elements(args.prompt) * KINDS["ours"].element_bytes / goodput
    stock, ours = fitted["stock"], fitted["ours"]
    over_floor = [
        ttft / (max(forward, wire) + ROUND_TRIP_S)
        for ttft, forward in zip(ours.rounds, compute, strict=True)
    ]
    results |= {"measured": records, "wire_s": wire, "compute_s": compute, "duels": duels}
    print(
        f"forward pass alone {statistics.median(compute):.3f} s in the same rounds, "
        f"BFP8 bytes at the link's goodput {wire:.3f} s"
    )
    figures = [
        Figure(
            "TTFT ours / stock, stock's transfer as long as its prefill",
            1 / ours.times_faster_than(stock),
            0.60,
            at_least=False,
        ),
        Figure(
            "TTFT ours / (max(compute, bytes / bandwidth) + 1 round trip)",
            statistics.median(over_floor),
            1.10,
            at_least=False,
        ),
    ]
    for tokens, ratios in duels.items():
        error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
        name = f"fast link, {tokens} tokens: layer by layer / after (standard error {error:.3f})"
        figures.append(Figure(name, statistics.median(ratios), 1.02, at_least=False))
    for name, what in (("after", "half the bytes alone"), ("native", "overlap alone")):
        share = 1 / fitted[name].times_faster_than(stock)
        print(f"{what}: TTFT {share:.2f}x stock's")
        results[f"{name}_over_stock"] = share
    if args.plot:
        plot(args.plot, records, args.prompt)
    finish(args, results, figures)


def plot(path: Path, records: list[dict[str, Any]], prompt: int) -> None:
    """TTFT over the link's rate at one prompt length, and over the length at the fitted rate."""
    import matplotlib.pyplot as plt

    by_rate = [r for r in records if r["tokens"] == prompt and r["scale"]]
    by_length = sorted((r for r in records if r["scale"] == 1.0), key=lambda r: r["tokens"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=False)
    for name, kind in KINDS.items():
        left.plot(
            [r["goodput_bytes_per_s"] * 8 / 1e6 for r in by_rate],
            [statistics.median(r["ttft_s"][name]) for r in by_rate],
            marker="o",
            label=kind.title,
        )
        right.plot(
            [r["tokens"] for r in by_length],
            [statistics.median(r["ttft_s"][name]) for r in by_length],
            marker="o",
        )
    left.set(title=f"{prompt} prompt tokens", xlabel="link, Mbit/s", ylabel="TTFT, s", xscale="log")
    right.set(title="link fitted to SGLang's prefill", xlabel="prompt tokens", ylabel="TTFT, s")
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    left.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
