"""One simulation of a mix at one rate, and what the page needs of it.

Functions of (question, run), which worker processes can be given.
"""

from dataclasses import dataclass

from sglang_hma.planner.page.data import Span
from sglang_hma.planner.search import Question
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.systems import Offer

SHOWN = 24  # requests of the timeline


@dataclass(frozen=True)
class Run:
    """rate: requests/s; seed: of the excerpt, as in goodput."""

    offer: Offer
    rate: float
    seed: int


def jobs_of(question: Question, run: Run) -> list[Job]:
    """Every request of the excerpt, finished, in order of arrival. Raises NeverFits."""
    return question.trial(run.offer, run.seed).jobs(run.rate)


def share_in_time(question: Question, run: Run) -> float:
    jobs = jobs_of(question, run)
    return sum(map(question.objectives.kept, jobs)) / len(jobs)


def latencies(question: Question, run: Run) -> tuple[list[float], list[float]]:
    """Seconds: TTFT of each request, and TPOT of those with more than one token."""
    jobs = jobs_of(question, run)
    tpot = [job.tpot_s for job in jobs if job.request.output_tokens > 1]
    return [job.ttft_s for job in jobs], tpot


def spans(question: Question, run: Run) -> list[Span]:
    """Of consecutive requests from the middle of the excerpt. run: of a pair."""
    jobs = jobs_of(question, run)
    begin = max(0, (len(jobs) - SHOWN) // 2)
    shown = jobs[begin : begin + SHOWN]
    zero = shown[0].arrived_at
    return [
        Span(
            input_tokens=job.request.input_tokens,
            output_tokens=job.request.output_tokens,
            known_tokens=job.known,
            retractions=job.retractions,
            arrived=job.arrived_at - zero,
            promised=job.promised_at - zero,
            prefill=job.prefill_at - zero,
            prefilled=job.prefilled_at - zero,
            sending=job.sending_at - zero,
            landed=job.landed_at - zero,
            first_token=job.first_token_at - zero,
            finished=job.finished_at - zero,
        )
        for job in shown
    ]
