"""The simulator against closed forms: queues, pipelines, memory, shared links. Within 1%.

Queues are random, and so is what their draws' mean is by itself, often by more than 1%. A recursion
of a few lines computes that mean from the same draws; its expectation is the closed form, so what
is left when its own deviation is taken out is the simulator's error (a control variate).
"""

import heapq
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from benchmark.common import Figure, console, finish, parser, table
from benchmark.planner.fleets import PLAIN, boxes, pair
from sglang_hma.planner.simulation.batch import RESERVED_TOKENS, KVMemory
from sglang_hma.planner.simulation.clock import Clock
from sglang_hma.planner.simulation.fleet import Colocated, Disaggregated, Simulation
from sglang_hma.planner.simulation.network import Link, Network
from sglang_hma.planner.step_times import Affine
from sglang_hma.planner.trace import Request

LAYERS = 36
MEAN_TOKENS = 1 / PLAIN.token_s  # a second of prefill


@dataclass(frozen=True)
class Row:
    """draws: what the same draws' mean is by a recursion, where anything is random."""

    name: str
    simulated: float
    exact: float
    draws: float | None = None

    @property
    def off(self) -> float:
        """Relative to the closed form, less what the draws are off by themselves."""
        chance = 0.0 if self.draws is None else self.draws - self.exact
        return abs(self.simulated - self.exact - chance) / self.exact


def lindley(arrivals: np.ndarray, service: np.ndarray) -> float:
    """Mean wait of a queue in order of arrival (Lindley 1952): each waits for what is left of the
    one before it."""
    wait = total = 0.0
    for between, before in zip(np.diff(arrivals), service[:-1], strict=True):
        wait = max(0.0, wait + before - between)
        total += wait
    return float(total / len(arrivals))


def processor_sharing(arrivals: np.ndarray, sizes: np.ndarray) -> float:
    """Mean time in a server that all share equally: each ends when the served share of one, which
    grows by 1/n a second, has grown by its size."""
    ends: list[tuple[float, float]] = []  # by the served share, and when they came
    now = served = total = 0.0
    for arrival, size in zip((*arrivals, math.inf), (*sizes, 0.0), strict=True):
        while ends and now + (ends[0][0] - served) * len(ends) <= arrival:
            now += (ends[0][0] - served) * len(ends)
            served, came = heapq.heappop(ends)
            total += now - came
        if ends:
            served += (arrival - now) / len(ends)
        now = arrival
        heapq.heappush(ends, (served + size, now))
    return float(total / len(arrivals))


def prefill_queue(load: float, count: int, seed: int, *, exponential: bool) -> Row:
    """M/D/1 or M/M/1: prompts of a second on average, one a pass, at `load` a second."""
    rng = np.random.default_rng(seed)
    arrivals = rng.exponential(1 / load, count).cumsum()
    tokens = (
        np.maximum(1, np.rint(rng.exponential(MEAN_TOKENS, count)))
        if exponential
        else np.full(count, MEAN_TOKENS)
    )
    requests = [Request(float(at), int(n), 1) for at, n in zip(arrivals, tokens, strict=True)]
    jobs = Simulation(requests).run(pair(max_prompts=1))
    service = np.array([PLAIN.prefill_s((int(n), 0)) for n in tokens])
    waits = [job.prefilled_at - job.arrived_at for job in jobs]
    return Row(
        f"wait before prefill, {'M/M/1' if exponential else 'M/D/1'}, load {load:g}",
        statistics.fmean(waits) - float(service.mean()),
        load / (1 - load) if exponential else load / 2 / (1 - load),
        lindley(arrivals, service),
    )


def shared_link(load: float, count: int, seed: int) -> Row:
    """M/M/1 with processor sharing: transfers of a second on average."""
    rng = np.random.default_rng(seed)
    clock, link = Clock(), Link(1.0)
    network, spent = Network(clock), []
    arrivals = rng.exponential(1 / load, count).cumsum()
    sizes = rng.exponential(1.0, count)

    def begin(index: int) -> None:
        at = clock.now
        network.send((link,), float(sizes[index]), lambda: spent.append(clock.now - at))
        if index + 1 < count:
            clock.at(float(arrivals[index + 1]), lambda: begin(index + 1))

    clock.at(float(arrivals[0]), lambda: begin(0))
    clock.run()
    return Row(
        f"transfer on a shared link, M/M/1 PS, load {load:g}",
        statistics.fmean(spent),
        1 / (1 - load),
        processor_sharing(arrivals, sizes),
    )


def ttft(name: str, fleet: Colocated | Disaggregated, exact: float, tokens: int) -> Row:
    (job,) = Simulation([Request(0.0, tokens, 2)]).run(fleet)
    return Row(f"TTFT alone, {tokens:,} tokens, {name}", job.ttft_s, exact)


def pipelines() -> list[Row]:
    rows = []
    for tokens in (512, 8192):
        compute = PLAIN.prefill_s((tokens, 0)) / LAYERS
        for gbit in (1, 10, 100):
            speed = gbit / 8 * 1e9
            for kind, wire in (("BFP8", 78336.0), ("BF16", 147456.0)):
                send = tokens * wire / speed / LAYERS
                links = {"layers": LAYERS, "wire_bytes": wire, "prefill_links": (speed,)}
                layered = max(LAYERS * compute + send, compute + LAYERS * send)
                rows.append(ttft(f"{kind} by layer, {gbit} Gb/s", pair(**links), layered, tokens))
                serial = LAYERS * (compute + send)
                fleet = pair(**links, layered=False)
                rows.append(ttft(f"{kind} after the pass, {gbit} Gb/s", fleet, serial, tokens))
        rows.append(ttft("co-located", boxes(), LAYERS * compute, tokens))
    return rows


def memory_limited_batch(requests_that_fit: int) -> Row:
    """Requests of equal length that all wait: a batch is done when its last token is."""
    prompt, made = 2048, 257
    memory = KVMemory(requests_that_fit * (prompt + RESERVED_TOKENS), 1.0, 1.0)
    batches = 5
    requests = [Request(0.0, prompt, made)] * (requests_that_fit * batches)
    fleet = pair(prefill_times=Affine(), decode_memory=memory)
    jobs = Simulation(requests).run(fleet)
    whole = max(job.finished_at for job in jobs)
    return Row(
        f"time of {batches} batches of {requests_that_fit}, limited by memory",
        whole,
        # The first request is alone for a step; its first token takes none.
        (batches * (made - 1) + 1) * PLAIN.step_s,
    )


def main() -> None:
    options = parser(__doc__ or "", timed=False)
    options.add_argument("--requests", type=int, default=100_000, help="of each random queue")
    options.add_argument("--seed", type=int, help="drawn if not given")
    args = options.parse_args()
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if args.seed is None else args.seed
    print(f"seed {seed}")
    n = args.requests
    work: list[Callable[[], Row]] = [
        lambda: prefill_queue(0.3, n, seed, exponential=False),
        lambda: prefill_queue(0.5, n, seed + 1, exponential=False),
        lambda: prefill_queue(0.5, n, seed + 2, exponential=True),
        lambda: shared_link(0.5, n, seed + 3),
        lambda: memory_limited_batch(32),
    ]
    rows = pipelines()
    rows += [each() for each in track(work, "queues", console=console)]
    table(
        "Simulator and closed forms, seconds",
        ("", "simulated", "same draws", "closed form", "off"),
        [
            (
                row.name,
                f"{row.simulated:.4f}",
                "" if row.draws is None else f"{row.draws:.4f}",
                f"{row.exact:.4f}",
                f"{row.off:.2%}",
            )
            for row in rows
        ],
    )
    figures = [Figure(row.name, row.off, 0.01, at_least=False) for row in rows]
    finish(args, {"seed": seed, "rows": [vars(row) | {"off": row.off} for row in rows]}, figures)


if __name__ == "__main__":
    main()
