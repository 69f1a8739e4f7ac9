"""A recorded run's arrivals through the simulator, and what comes out beside what was recorded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_hma.planner import scaled
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.measured import Measured
from sglang_hma.planner.recorded import Run
from sglang_hma.planner.simulation.batch import KVMemory
from sglang_hma.planner.simulation.fleet import Disaggregated, Simulation
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.trace import Request


@dataclass(frozen=True)
class Pair:
    """What the recorded servers were told: --chunked-prefill-size, --max-total-tokens."""

    chunk_tokens: int = 8192
    kv_tokens: int = 1 << 40

    def replay(self, times: Measured, requests: Sequence[Request]) -> list[Job]:
        return Simulation(requests).run(self.fleet(times))

    def objectives(self, times: Measured, requests: Sequence[Request]) -> Objectives:
        """Five and three times the TTFT and TPOT that the median request has alone."""
        return scaled.objectives(self.fleet(times), requests, share=0.5)

    def fleet(self, times: Measured) -> Disaggregated:
        """Its links take no time: the measured times have it."""
        return Disaggregated(
            1,
            1,
            times.affine,
            times.affine,
            KVMemory(float(self.kv_tokens), 1.0, 1.0),
            cache_tokens=0,
            layers=1,
            wire_bytes=0.0,
            prefill_links=(1e15,),
            decode_links=(1e15,),
            chunk_tokens=self.chunk_tokens,
            overhead_s=times.overhead_s,
        )


@dataclass(frozen=True)
class Beside:
    """A figure of a run: seconds, or requests a second."""

    name: str
    real: float
    simulated: float

    @property
    def error(self) -> float:
        """Relative to the real one; 0 where both are 0."""
        if self.real == self.simulated:
            return 0.0
        return self.simulated / self.real - 1 if self.real else float("inf")


def beside(run: Run, pair: Pair, times: Measured, objectives: Objectives) -> list[Beside]:
    """Median and P90 of TTFT and TPOT, and goodput: requests a second that keep the objectives."""
    jobs = pair.replay(times, run.requests)
    lasting = [request.output_tokens > 1 for request in run.requests]
    real = (np.array(run.ttft_s), np.array(run.tpot_s))
    simulated = (np.array([job.ttft_s for job in jobs]), np.array([job.tpot_s for job in jobs]))
    figures = []
    for name, ours, theirs in (
        ("TTFT", real[0], simulated[0]),
        ("TPOT", real[1][lasting], simulated[1][lasting]),
    ):
        for title, share in (("median", 0.5), ("P90", 0.9)) if len(ours) else ():
            quantiles = (float(np.quantile(values, share)) for values in (ours, theirs))
            figures.append(Beside(f"{title} {name}", *quantiles))
    kept = [
        int(((ttft <= objectives.ttft_s) & (tpot <= objectives.tpot_s)).sum())
        for ttft, tpot in (real, simulated)
    ]
    return [
        *figures,
        Beside("goodput", kept[0] / run.duration_s, kept[1] / max(job.finished_at for job in jobs)),
    ]
