"""The highest rate at which enough requests keep their objectives (DistServe, OSDI 2024)."""

import math
import statistics
from collections.abc import Callable, Sequence
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


LOWEST, HIGHEST = 1e-4, 1e7  # requests/s that are tried

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
    found: list[float] = []
    alone: list[float] = []
    for seed in range(seeds):
        window = windows(requests, count, seed)
        guess = found[-1] if found else 0.0
        rate, unloaded = _one(fleet, window, objectives, seed, tolerance, policy, guess)
        found.append(rate)
        alone.append(unloaded)
    spread = statistics.stdev(found) if seeds > 1 else 0.0
    half = _t95(seeds - 1) * spread / math.sqrt(seeds) if seeds > 1 else 0.0
    return Goodput(statistics.fmean(found), half, tuple(found), statistics.fmean(alone))


def attained(
    fleet: Colocated | Disaggregated,
    requests: Sequence[Request],
    objectives: Objectives,
    seed: int,
    policy: Policy,
) -> float:
    """The share that keeps the objectives; too low a one where it is below what is asked for."""
    may_miss = (1 - objectives.share) * len(requests)

    def hopeless(simulation: Simulation) -> bool:
        now = simulation.clock.now
        return sum(objectives.missed(job, now) for job in simulation.jobs) > may_miss

    jobs = Simulation(requests, policy, seed).run(fleet, hopeless)
    return sum(map(objectives.kept, jobs)) / len(requests)


def _one(
    fleet: Colocated | Disaggregated,
    window: Sequence[Request],
    objectives: Objectives,
    seed: int,
    tolerance: float,
    policy: Policy,
    guess: float,
) -> tuple[float, float]:
    """The highest rate, and the share in time when each is alone. guess: a rate near it, or 0."""

    def keeps(rate: float) -> bool:
        share = attained(fleet, at_rate(window, rate), objectives, seed, policy)
        return share >= objectives.share

    # Each alone: far enough apart that none meets another.
    few = at_rate(window[:: max(1, len(window) // 200)], LOWEST)
    unloaded = attained(fleet, few, objectives, seed, policy)
    if unloaded < objectives.share:
        return 0.0, unloaded
    low, high = _bracket(keeps, guess or 1.0, 1.1 if guess else 2.0)
    while high - low > tolerance * high:
        middle = math.sqrt(low * high)
        if keeps(middle):
            low = middle
        else:
            high = middle
    return low, unloaded


def _bracket(keeps: Callable[[float], bool], rate: float, step: float) -> tuple[float, float]:
    """A rate that is kept and one that is not; the same one twice at the ends of what is tried.

    Each step is twice as wide as the one before, by the logarithm.
    """
    if keeps(rate):
        low = rate
        while low < HIGHEST:
            high, step = low * step, step * step
            if not keeps(high):
                return low, high
            low = high
        return low, low
    high = rate
    while high > LOWEST:
        low, step = high / step, step * step
        if keeps(low):
            return low, high
        high = low
    return high, high


def _t95(freedom: int) -> float:
    """Student's t for a two-sided 95% interval."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    return table[freedom - 1] if freedom <= len(table) else 1.96
