"""What the page is made of: prices, break-even, attainment, distributions, stages, sources."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import msgspec
import pytest

from benchmark.planner.fleets import pair
from sglang_hma.planner import catalogue, goodput, parallel, search
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.model_shape import shape_of
from sglang_hma.planner.page.collect import COMMON, LOADS, NEAR, SHARES, collect, quantiles
from sglang_hma.planner.page.data import Page
from sglang_hma.planner.page.runs import SHOWN, Run, jobs_of, share_in_time, spans
from sglang_hma.planner.page.sources import named
from sglang_hma.planner.page.subject import Subject
from sglang_hma.planner.report import Comparison
from sglang_hma.planner.search import Answer, Budget, Question
from sglang_hma.planner.systems import COLOCATED, SYSTEMS, Offer, Site, System, offer
from sglang_hma.planner.trace import Request

SHAPE = shape_of("Qwen3-8B")


EVEN = [Request(float(i), 1000, 11) for i in range(400)]


def bought(fleet: object) -> Offer:
    return Offer("ours", 1, 1, fleet, 1000.0, 500.0, 100.0, ())  # type: ignore[arg-type]


def test_attainment_crosses_the_share_at_the_goodput() -> None:
    question = Question(EVEN, Objectives(1.2, 0.02), seeds=1, tolerance=0.005)
    one = bought(pair(max_prompts=1))
    found = question.ask(one).rate
    assert share_in_time(question, Run(one, found, 0)) >= 0.9
    assert share_in_time(question, Run(one, 1.1 * found, 0)) < 0.9
    # At twice the capacity those before them have filled the queue.
    assert share_in_time(question, Run(one, 2.0, 0)) == 0


def test_quantiles_are_order_statistics(seed: int) -> None:
    rng = random.Random(seed)
    values = [rng.expovariate(1.0) for _ in range(rng.randint(1, 700))]
    found = quantiles(values)
    assert len(found) == len(SHARES) and set(found) <= set(values)
    for share, value in zip(SHARES, found, strict=True):
        assert sum(each <= value for each in values) / len(values) >= share - 1e-12
        assert sum(each < value for each in values) / len(values) <= share + 1e-12
    assert quantiles([]) == []


@pytest.mark.parametrize("bytes_s", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("layered", [True, False])
def test_stages_of_one_request(bytes_s: float, layered: bool) -> None:
    """A second of prefill in four layers; each layer's 250 bytes leave when it is computed."""
    fleet = pair(prefill_links=(bytes_s,), layered=layered)
    far_apart = [Request(5.0, 1000, 11), Request(6.0, 1000, 11)]
    question = Question(far_apart, Objectives(1.2, 0.02), seeds=1, count=1)
    (span,) = spans(question, Run(bought(fleet), 1e-3, 0))
    assert (span.arrived, span.promised, span.prefill, span.prefilled) == (0, 0, 0, 1)
    assert span.sending == pytest.approx(0.25 if layered else 1.0)
    send = 1000 / bytes_s
    landed = max(1 + send / 4, 0.25 + send) if layered else 1 + send
    assert span.landed == span.first_token == pytest.approx(landed)
    assert span.finished == pytest.approx(landed + 0.1)


def test_stages_follow_each_other_under_load(seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        Request(i + rng.random(), rng.randint(1, 3000), rng.randint(1, 60)) for i in range(200)
    ]
    fleet = pair(prefill_instances=2, chunk_tokens=512, prefill_links=(1e4,), decode_links=(1e4,))
    question = Question(requests, Objectives(1.2, 0.02), seeds=1)
    run = Run(bought(fleet), rng.uniform(0.5, 3), 0)
    found = spans(question, run)
    assert len(found) == SHOWN
    for span in found:
        assert span.arrived <= span.promised <= span.prefill < span.prefilled <= span.landed
        assert span.prefill < span.sending < span.landed <= span.first_token <= span.finished
    starts = [span.arrived for span in found]
    assert starts[0] == 0 and starts == sorted(starts)
    jobs = jobs_of(question, run)
    ttft = [job.ttft_s for job in jobs]
    shown = [span.first_token - span.arrived for span in found]
    at = (len(jobs) - SHOWN) // 2
    assert shown == pytest.approx(ttft[at : at + SHOWN])


def test_every_figure_has_a_name_a_unit_and_the_catalogues_value() -> None:
    known, site = catalogue.load(), Site()
    for system in SYSTEMS:
        prefill = 0 if system in COLOCATED else 2
        one = offer(known, SHAPE, site, system, prefill, 1)
        found = named(known, site, one)
        assert [figure.source for figure in found] == [figure.source for figure in one.used]
        assert all(";" not in figure.name for figure in found)  # no two of the same value
        tables = [figure for figure in found if figure.value is None]
        assert [figure.name for figure in tables] == ["step times"]
        assert "AIConfigurator" in tables[0].source
        by_name = {figure.name: figure for figure in found}
        price = by_name["NVIDIA A100 SXM 80 GB, price"]
        assert (price.value, price.unit) == (known.card(site.hbm).price_usd.value, "USD")


def refuse_three(value: int) -> int:
    if value == 3:
        raise ArithmeticError("three")
    return value * value


@pytest.mark.parametrize("processes", [1, 2])
def test_each_keeps_the_order_and_hears_everything(processes: int) -> None:
    heard: dict[int, int] = {}
    squares = parallel.each(
        abs, [-9, 4, -3, 0], processes=processes, heard=lambda at, found: heard.update({at: found})
    )
    assert squares == [9, 4, 3, 0] and heard == dict(enumerate(squares))
    with pytest.raises(ArithmeticError, match="three"):
        parallel.each(refuse_three, range(6), processes=processes)


@pytest.fixture(scope="module")
def subject() -> Subject:
    """Three systems on few requests, with two links and two efficiencies to choose from."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    known = catalogue.load()
    known = msgspec.structs.replace(
        known,
        links={name: known.links[name] for name in ("100g", "25g")},
        efficiencies={
            name: figure
            for name, figure in known.efficiencies.items()
            if not name.startswith("tenstorrent-")
            or name in ("tenstorrent-memory", "tenstorrent-one-chip", "tenstorrent-ceiling")
        },
    )
    site, budget = Site(), Budget(instances=2)
    requests = [
        Request(i * 0.5 + rng.random() / 2, rng.randint(1000, 8000), rng.randint(2, 200))
        for i in range(100)
    ]
    question = Question(requests, goodput.NAMED["server"], seeds=2, count=50, tolerance=0.05)
    systems: Sequence[System] = ("colocated", "pd-bf16", "ours")
    offers = [each for name in systems for each in search.mixes(known, SHAPE, site, name, budget)]
    answers = search.ask(question, offers, processes=1)
    found = Comparison(SHAPE.name, "made.csv", site, question.objectives, answers)
    return Subject(known, SHAPE, budget, question, found, "dollar", processes=1)


@pytest.fixture(scope="module")
def page(subject: Subject) -> Page:
    return collect(subject)


def test_the_page_holds_what_was_simulated(subject: Subject, page: Page) -> None:
    question, found = subject.question, subject.comparison
    best = {row.system: found.best(row.system, "dollar") for row in page.rows}  # type: ignore[arg-type]
    assert list(best) == ["colocated", "pd-bf16", "ours"]
    for row in page.rows:
        answer = best[row.system]
        assert answer is not None and (row.rate, row.mix) == (answer.goodput.rate, answer.offer.mix)
    for curve in page.curves:
        answer = best[curve.system]
        assert answer is not None
        at = random.randrange(len(LOADS))
        rate = LOADS[at] * answer.goodput.rate
        shares = [share_in_time(question, Run(answer.offer, rate, seed)) for seed in (0, 1)]
        assert curve.rates[at] == rate
        assert curve.shares[at] == pytest.approx(sum(shares) / 2)
        assert (curve.least[at], curve.most[at]) == (min(shares), max(shares))
    latencies, base = page.distributions, best["pd-bf16"]
    assert latencies is not None and base is not None
    assert latencies.rate == COMMON * base.goodput.rate
    for own in latencies.systems:
        answer = best[own.system]
        assert answer is not None
        jobs = [
            job
            for seed in (0, 1)
            for job in jobs_of(question, Run(answer.offer, latencies.rate, seed))
        ]
        assert own.ttft_s == quantiles([job.ttft_s for job in jobs])
        assert own.tpot_s == quantiles([job.tpot_s for job in jobs])
    assert page.timeline is not None and best["ours"] is not None
    assert page.timeline.rate == NEAR * best["ours"].goodput.rate


def test_the_grid_is_what_asking_each_site_gives(subject: Subject, page: Page) -> None:
    even = page.break_even
    assert even is not None
    assert [choice.name for choice in even.links] == ["25g", "100g"]
    assert [choice.value for choice in even.efficiencies] == [0.22, 0.5]
    assert (even.efficiency_at, even.link_at) == (0, 1)
    for efficiency, row in zip(even.efficiencies, even.states, strict=True):
        for link, state in zip(even.links, row, strict=True):
            site = replace(subject.comparison.site, efficiency=efficiency.name, link=link.name)
            ask = partial(asked, subject, site)
            (ours, base, alone) = map(ask, ("ours", "pd-bf16", "colocated"))
            assert state.rates[even.ratio_at] == ours.goodput.rate
            for line in state.lines:
                other = base if line.baseline == "pd-bf16" else alone
                if line.basis == "whole":
                    over = ours.per_dollar / other.per_dollar
                    assert line.over[even.ratio_at] == pytest.approx(over)
    assert not math.isclose(even.states[0][0].rates[0], even.states[1][1].rates[0])


def asked(subject: Subject, site: Site, system: System) -> Answer:
    """The best by dollar of the few mixes of two instances."""
    offers = search.mixes(subject.catalogue, SHAPE, site, system, subject.budget)
    return max(
        (Answer(each, subject.question.ask(each)) for each in offers),
        key=lambda each: each.per_dollar,
    )
