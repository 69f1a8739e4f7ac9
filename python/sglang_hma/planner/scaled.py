"""Objectives from what a baseline does with nothing to wait for."""

import statistics
from collections.abc import Sequence

from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.simulation.fleet import Colocated, Disaggregated, Simulation
from sglang_hma.planner.trace import Request, at_rate

TTFT_FACTOR, TPOT_FACTOR = 5.0, 3.0


def objectives(baseline: Colocated | Disaggregated, requests: Sequence[Request]) -> Objectives:
    """Five times the baseline's median TTFT alone, and three times its TPOT."""
    jobs = Simulation(at_rate(requests[:200], 1e-4)).run(baseline)
    ttft = statistics.median(job.ttft_s for job in jobs)
    tpot = statistics.median(job.tpot_s for job in jobs if job.request.output_tokens > 1)
    return Objectives(TTFT_FACTOR * ttft, TPOT_FACTOR * tpot)
