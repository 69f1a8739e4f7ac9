"""The highest rate at which enough requests keep their objectives (DistServe, OSDI 2024)."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_hma.planner.simulation.fleet import Colocated, Disaggregated, Policy, Simulation
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.trace import Request, at_rate


@dataclass(frozen=True)
class Objectives:
    """Seconds, and the share of requests that must keep both.

    A request that is late, retracted or made to wait counts as it was; none is dropped.
    """

    ttft_s: float
    tpot_s: float
    share: float = 0.9

    def kept(self, job: Job) -> bool:
        return job.ttft_s <= self.ttft_s and job.tpot_s <= self.tpot_s

    def missed(self, job: Job, now: float) -> bool:
        """Surely, at `now`."""
        first = now if math.isnan(job.first_token_at) else job.first_token_at
        return first - job.arrived_at > self.ttft_s


# MLPerf Inference's pairs for llama3.1-8b.
NAMED = {"server": Objectives(2.0, 0.1), "interactive": Objectives(0.5, 0.03)}


@dataclass(frozen=True)
class Goodput:
    """requests/s: the mean over seeds and half of its 95% interval (0 for one seed).

    0 where the objectives are impossible: too few requests keep them even when each is alone.
    """

    rate: float
    half_width: float
    by_seed: tuple[float, ...]
    unloaded: float
    """Share of requests that keep the objectives when each is alone."""

    @property
    def possible(self) -> bool:
        return self.rate > 0


def windows(requests: Sequence[Request], count: int, seed: int) -> list[Request]:
    """`count` requests in a row, from another place of the trace for each seed (0: the first)."""
    if count >= len(requests):
        return list(requests)
    start = (seed * 0.618033988749895 % 1.0) * (len(requests) - count)
    return list(requests[int(start) :][:count])


def of(
    fleet: Colocated | Disaggregated,
    requests: Sequence[Request],
    objectives: Objectives,
    *,
    seeds: int = 1,
    count: int = 2000,
    tolerance: float = 0.02,
    policy: Policy = "power_of_two",
) -> Goodput:
    """By bisection, over `seeds` windows of `count` requests each, to a relative `tolerance`."""
    found, alone = [], []
    for seed in range(seeds):
        window = windows(requests, count, seed)
        rate, unloaded = _one(fleet, window, objectives, seed, tolerance, policy)
        found.append(rate)
        alone.append(unloaded)
    spread = statistics.stdev(found) if seeds > 1 else 0.0
    half = _t95(seeds - 1) * spread / math.sqrt(seeds) if seeds > 1 else 0.0
    return Goodput(statistics.fmean(found), half, tuple(found), statistics.fmean(alone))


def _one(
    fleet: Colocated | Disaggregated,
    window: Sequence[Request],
    objectives: Objectives,
    seed: int,
    tolerance: float,
    policy: Policy,
) -> tuple[float, float]:
    def attained(rate: float, requests: Sequence[Request] = window) -> float:
        may_miss = (1 - objectives.share) * len(requests)

        def hopeless(simulation: Simulation) -> bool:
            now = simulation.clock.now
            return sum(objectives.missed(job, now) for job in simulation.jobs) > may_miss

        jobs = Simulation(at_rate(requests, rate), policy, seed).run(fleet, hopeless)
        return sum(map(objectives.kept, jobs)) / len(requests)

    # Each alone: far enough apart that none meets another.
    unloaded = attained(1e-4, window[:: max(1, len(window) // 200)])
    if unloaded < objectives.share:
        return 0.0, unloaded
    low, high = 0.0, 1.0
    while attained(high) >= objectives.share:
        low, high = high, high * 2
        if high > 1e7:
            return low, unloaded
    while not low or high - low > tolerance * high:
        if not low and high < 1e-4:
            return high, unloaded
        middle = math.sqrt(low * high) if low else high / 2
        if attained(middle) >= objectives.share:
            low = middle
        else:
            high = middle
    return low, unloaded


def _t95(freedom: int) -> float:
    """Student's t for a two-sided 95% interval."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    return table[freedom - 1] if freedom <= len(table) else 1.96
