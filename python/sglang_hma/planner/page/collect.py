"""Computes what the page shows."""

from functools import partial

import numpy as np

from sglang_hma import __version__
from sglang_hma.planner.page.break_even import break_even
from sglang_hma.planner.page.data import (
    Curve,
    Distribution,
    Distributions,
    Page,
    Row,
    Setting,
    Timeline,
    Tried,
)
from sglang_hma.planner.page.prices import price_of
from sglang_hma.planner.page.runs import Run, latencies, share_in_time, spans
from sglang_hma.planner.page.sources import named
from sglang_hma.planner.page.subject import Subject
from sglang_hma.planner.search import Answer, Budget
from sglang_hma.planner.systems import SYSTEMS, TITLES, System

BASELINE: System = "pd-bf16"
LOADS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35)
"""Of a mix's goodput: the rates of its attainment curve."""
COMMON = 0.8
"""Of the baseline's goodput: the rate of the distributions."""
NEAR = 0.95
"""Of our goodput: the rate of the timeline."""
SHARES = tuple(index / 200 for index in range(201))


def collect(subject: Subject) -> Page:
    """Simulates what the comparison has not: see LOADS, COMMON, NEAR and break_even."""
    found, by = subject.comparison, subject.by
    best: dict[System, Answer] = {}
    for system in SYSTEMS:
        answer = found.best(system, by)
        if answer is not None:
            best[system] = answer
    return Page(
        setting=_setting(subject),
        rows=[row for system in SYSTEMS if (row := _row(subject, system, best)) is not None],
        tried=[_tried(each) for each in found.answers],
        curves=_curves(subject, best),
        distributions=_distributions(subject, best),
        break_even=break_even(subject),
        timeline=_timeline(subject, best),
    )


def _setting(subject: Subject) -> Setting:
    found, question = subject.comparison, subject.question
    cards = subject.catalogue.cards
    return Setting(
        version=__version__,
        model=found.model,
        trace=found.trace,
        hardware=found.site.describe(),
        hbm=cards[found.site.hbm].title,
        gddr=cards[found.site.gddr].title if found.site.gddr in cards else found.site.gddr,
        by=subject.by,
        budget=_budget(subject.budget),
        ttft_s=found.objectives.ttft_s,
        tpot_s=found.objectives.tpot_s,
        share=found.objectives.share,
        seeds=question.seeds,
        requests=min(question.count, len(question.requests)),
        tolerance=question.tolerance,
        policy=question.policy,
        chunk_tokens=found.site.chunk_tokens,
    )


def _budget(budget: Budget) -> str:
    parts = []
    if budget.usd is not None:
        parts.append(f"{budget.usd:,.0f} USD")
    if budget.watts is not None:
        parts.append(f"{budget.watts:,.0f} W")
    if budget.instances is not None:
        parts.append(f"{budget.instances} instances")
    return " and ".join(parts)


def _row(subject: Subject, system: System, best: dict[System, Answer]) -> Row | None:
    """None for a system that was not asked for, or that the budget buys no mix of."""
    found = subject.comparison
    tried = [each for each in found.answers if each.offer.system == system]
    if not tried:
        return None
    if system not in best:
        alone = max(each.goodput.unloaded for each in tried)
        return Row(system, TITLES[system], alone)
    answer, base = best[system], best.get(BASELINE)
    return Row(
        system,
        TITLES[system],
        answer.goodput.unloaded,
        mix=answer.offer.mix,
        price=price_of(subject.catalogue, found.site, answer.offer),
        rate=answer.goodput.rate,
        half_width=answer.goodput.half_width,
        per_thousand_usd=answer.per_dollar,
        beside_rate=answer.goodput.rate / base.goodput.rate if base else None,
        beside_per_usd=answer.per_dollar / base.per_dollar if base else None,
        figures=named(subject.catalogue, found.site, answer.offer),
    )


def _tried(answer: Answer) -> Tried:
    offer, goodput = answer.offer, answer.goodput
    return Tried(
        offer.system,
        offer.mix,
        offer.price_usd,
        offer.cards_usd,
        offer.watts,
        goodput.rate,
        goodput.half_width,
    )


def _curves(subject: Subject, best: dict[System, Answer]) -> list[Curve]:
    seeds = subject.question.seeds
    runs = [
        Run(answer.offer, load * answer.goodput.rate, seed)
        for answer in best.values()
        for load in LOADS
        for seed in range(seeds)
    ]
    found = subject.each("attainment", partial(share_in_time, subject.question), runs)
    shares = np.array(found).reshape(len(best), len(LOADS), seeds)
    return [
        Curve(
            system,
            rates=[load * answer.goodput.rate for load in LOADS],
            shares=own.mean(axis=1).tolist(),
            least=own.min(axis=1).tolist(),
            most=own.max(axis=1).tolist(),
        )
        for (system, answer), own in zip(best.items(), shares, strict=True)
    ]


def _distributions(subject: Subject, best: dict[System, Answer]) -> Distributions | None:
    """At a share of the baseline's goodput; of the least goodput where the baseline has none."""
    if not best:
        return None
    least = min(best, key=lambda system: best[system].goodput.rate)
    baseline = BASELINE if BASELINE in best else least
    rate, seeds = COMMON * best[baseline].goodput.rate, subject.question.seeds
    runs = [Run(each.offer, rate, seed) for each in best.values() for seed in range(seeds)]
    found = subject.each("latencies", partial(latencies, subject.question), runs)
    systems = []
    for index, system in enumerate(best):
        own = found[index * seeds : (index + 1) * seeds]
        ttft, tpot = ([value for each in own for value in each[which]] for which in (0, 1))
        systems.append(Distribution(system, list(SHARES), quantiles(ttft), quantiles(tpot)))
    return Distributions(rate, COMMON, baseline, systems)


def quantiles(values: list[float]) -> list[float]:
    """At SHARES, each one of the values; none of none."""
    if not values:
        return []
    result: list[float] = np.quantile(values, SHARES, method="inverted_cdf").tolist()
    return result


def _timeline(subject: Subject, best: dict[System, Answer]) -> Timeline | None:
    if "ours" not in best:
        return None
    answer = best["ours"]
    rate = NEAR * answer.goodput.rate
    (found,) = subject.each(
        "timeline", partial(spans, subject.question), [Run(answer.offer, rate, 0)]
    )
    return Timeline("ours", answer.offer.mix, rate, NEAR, found)
