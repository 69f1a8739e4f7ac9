"""Objectives from what a baseline does with nothing to wait for."""

from collections.abc import Sequence

import numpy as np

from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.simulation.fleet import Colocated, Disaggregated, Simulation
from sglang_hma.planner.trace import Request, apart

TTFT_FACTOR, TPOT_FACTOR = 5.0, 3.0
SAMPLE = 400  # requests of a trace


def objectives(
    baseline: Colocated | Disaggregated, requests: Sequence[Request], share: float = 0.9
) -> Objectives:
    """Five times the TTFT and three times the TPOT that `share` of the requests have at most where
    the baseline serves each alone."""
    chosen = requests[:: max(1, len(requests) // SAMPLE)]
    jobs = Simulation(apart(chosen)).run(baseline)
    ttft = np.quantile([job.ttft_s for job in jobs], share)
    lasting = [job.tpot_s for job in jobs if job.request.output_tokens > 1]
    tpot = np.quantile(lasting, share) if lasting else np.inf
    return Objectives(TTFT_FACTOR * float(ttft), TPOT_FACTOR * float(tpot), share)
