"""The highest rate at which enough requests keep their objectives (DistServe, OSDI 2024)."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from sglang_hma.planner.simulation.fleet import Colocated, Disaggregated, Policy, Simulation
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.trace import Request, apart, excerpt


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

    0 where the objectives are impossible: too few requests keep them even when each is alone, or
    in the trace's rhythm however slow it is.
    """

    rate: float
    half_width: float
    by_seed: tuple[float, ...]
    unloaded: float
    """Share of requests that keep the objectives when each is alone."""

    @property
    def possible(self) -> bool:
        return self.rate > 0


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
    """By bisection, over `seeds` excerpts of `count` requests each, to a relative `tolerance`.

    An excerpt is judged amid a steady load. Near capacity a load takes long to become steady, so
    a short excerpt's rate comes out 1% to 2% too high.
    """
    found: list[float] = []
    alone: list[float] = []
    for seed in range(seeds):
        trial = Trial(fleet, requests, objectives, seed, count, policy)
        unloaded = trial.unloaded()
        alone.append(unloaded)
        if unloaded < objectives.share:
            found.append(0.0)
            continue
        guess = found[-1] if found else 0.0

        def keeps(rate: float, trial: Trial = trial) -> bool:
            return trial.attained(rate) >= objectives.share

        low, high = _bracket(keeps, guess or 1.0, 1.1 if guess else 2.0)
        while high - low > tolerance * high:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if keeps(middle) else (low, middle)
        found.append(low if low > LOWEST else 0.0)
    return Goodput(*interval(found), tuple(found), statistics.fmean(alone))


@dataclass(frozen=True)
class Trial:
    """A fleet that serves an excerpt of a trace, at any rate."""

    fleet: Colocated | Disaggregated
    requests: Sequence[Request]
    objectives: Objectives
    seed: int = 0
    count: int = 2000
    policy: Policy = "power_of_two"

    @property
    def start(self) -> int:
        """Where the excerpt begins: another place for each seed, the trace's first for 0."""
        return int(self.seed * 0.618033988749895 % 1.0 * max(0, len(self.requests) - self.count))

    @cached_property
    def _alone(self) -> list[Job]:
        """Requests of the excerpt, each alone."""
        chosen = self.requests[self.start :][: self.count]
        few = apart(chosen[:: max(1, len(chosen) // 200)])
        return Simulation(few, self.policy, self.seed).run(self.fleet)

    @cached_property
    def _stays(self) -> dict[float, float]:
        """Seconds that turned out long enough, by rate."""
        return {0.0: _stay(self._alone)}

    def unloaded(self) -> float:
        """The share that is in time where each request is alone."""
        return sum(map(self.objectives.kept, self._alone)) / len(self._alone)

    def attained(self, rate: float) -> float:
        """The share that is in time; too low a one where it is below what is asked for."""
        jobs = self.jobs(rate, until_decided=True)
        return sum(map(self.objectives.kept, jobs)) / min(self.count, len(self.requests))

    def jobs(self, rate: float, *, until_decided: bool = False) -> list[Job]:
        """Of the excerpt, amid others; finished, or `until_decided` whether enough are in time.

        Others come for twice as long before it as nine in ten requests stay. How long that is
        depends on the load, so it is tried, from what they stay alone or at a lower rate.
        """
        stay = max(stay for lower, stay in self._stays.items() if lower <= rate)
        while True:
            jobs = self._amid(rate, stay, until_decided=until_decided)
            if any(math.isnan(job.finished_at) for job in jobs):
                return jobs
            if _stay(jobs) <= 1.1 * stay:
                self._stays[rate] = stay
                return jobs
            if sum(map(self.objectives.kept, jobs)) < self.objectives.share * len(jobs):
                return jobs  # a longer load makes it no better
            stay = max(_stay(jobs), 1.5 * stay)

    def _amid(self, rate: float, stay: float, *, until_decided: bool) -> list[Job]:
        count = min(self.count, len(self.requests))
        requests, meant = excerpt(self.requests, self.start, count, rate, 2 * stay, stay)
        may_miss = (1 - self.objectives.share) * count

        def decided(simulation: Simulation) -> bool:
            """All that are meant have ended, or too many of them are late."""
            jobs, now = simulation.jobs[meant], simulation.clock.now
            if len(jobs) == count and not any(math.isnan(job.finished_at) for job in jobs):
                return True
            late = sum(self.objectives.missed(job, now) for job in jobs)
            return until_decided and late > may_miss

        return Simulation(requests, self.policy, self.seed).run(self.fleet, decided)[meant]


def _stay(jobs: Sequence[Job]) -> float:
    """Seconds that nine in ten of them stay at most."""
    stays = sorted(job.finished_at - job.arrived_at for job in jobs)
    return stays[len(stays) * 9 // 10]


def _bracket(keeps: Callable[[float], bool], rate: float, step: float) -> tuple[float, float]:
    """A rate that is kept and one that is not; the same one twice at the ends of what is tried.

    Steps grow from `step` to a doubling.
    """
    if keeps(rate):
        low = rate
        while low < HIGHEST:
            high, step = low * step, min(2.0, step * step)
            if not keeps(high):
                return low, high
            low = high
        return low, low
    high = rate
    while high > LOWEST:
        low, step = high / step, min(2.0, step * step)
        if keeps(low):
            return low, high
        high = low
    return high, high


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95% interval (0 for one value)."""
    count = len(values)
    spread = statistics.stdev(values) if count > 1 else 0.0
    half = _t95(count - 1) * spread / math.sqrt(count) if count > 1 else 0.0
    return statistics.fmean(values), half


def _t95(freedom: int) -> float:
    """Student's t for a two-sided 95% interval."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    return table[freedom - 1] if freedom <= len(table) else 1.96
