"""Prices by part, and the price of a GDDR card at which ours breaks even."""

import random
from dataclasses import replace

import msgspec
import pytest

from sglang_hma.planner import catalogue
from sglang_hma.planner.catalogue import Catalogue, Figure
from sglang_hma.planner.goodput import Goodput
from sglang_hma.planner.model_shape import shape_of
from sglang_hma.planner.page.break_even import efficiencies_of, ratios_of, state_of
from sglang_hma.planner.page.prices import Priced, best_at, crossing_usd, price_of
from sglang_hma.planner.search import Answer
from sglang_hma.planner.systems import COLOCATED, SYSTEMS, Offer, Site, System, offer

SHAPE = shape_of("Qwen3-8B")


def repriced(known: Catalogue, name: str, usd: float) -> Catalogue:
    """The same with another price of one card."""
    price = Figure(usd, "assumed", "a test")
    card = msgspec.structs.replace(known.card(name), price_usd=price)
    return msgspec.structs.replace(known, cards=known.cards | {name: card})


def any_site(rng: random.Random, known: Catalogue) -> Site:
    return Site(
        hbm=rng.choice(["a100-sxm-80", "h100-sxm", "h200-sxm"]),
        hbm_cards=rng.randint(1, 2),
        gddr=rng.choice(["n150", "n300", "p100a", "p150"]),
        gddr_cards=rng.choice([1, 2, 4]),
        link=rng.choice(list(known.links)),
    )


def any_offer(rng: random.Random, known: Catalogue, site: Site, system: System) -> Offer:
    prefill = 0 if system in COLOCATED else rng.randint(1, 12)
    return offer(known, SHAPE, site, system, prefill, rng.randint(1, 5))


def served(offer: Offer, rate: float) -> Answer:
    return Answer(offer, Goodput(rate, 0.0, (rate,), 1.0))


@pytest.mark.parametrize("system", SYSTEMS)
def test_parts_of_a_price_are_the_offers(system: System, seed: int) -> None:
    rng, known = random.Random(seed), catalogue.load()
    for _ in range(20):
        # 12 GB hold no weights of 8 billion elements and KV too, on one card.
        site = replace(any_site(rng, known), gddr=rng.choice(["n300", "p100a", "p150"]))
        bought = any_offer(rng, known, site, system)
        price = price_of(known, site, bought)
        assert price.usd == pytest.approx(bought.price_usd)
        assert price.hbm_usd + price.gddr_usd == pytest.approx(bought.cards_usd)
        usd = rng.uniform(1, 50_000)
        dearer = offer(
            *(repriced(known, site.gddr, usd), SHAPE, site, system),
            bought.prefill,
            bought.decode,
        )
        priced = Priced("", 1.0, price.usd - price.gddr_usd, price.gddr_cards)
        assert priced.usd(usd) == pytest.approx(dearer.price_usd)


def test_one_mix_breaks_even_where_arithmetic_says() -> None:
    """3 requests/s for 10 dollars and 4 cards: 0.1 a dollar is 30 dollars, so 5 a card."""
    assert crossing_usd([Priced("", 3.0, 10.0, 4)], 0.1) == pytest.approx(5.0)
    assert crossing_usd([Priced("", 3.0, 40.0, 4)], 0.1) == pytest.approx(-2.5)


def test_the_best_of_mixes_breaks_even_at_the_last_of_their_prices(seed: int) -> None:
    """Looked for by bisection over prices."""
    rng = random.Random(seed)
    for _ in range(50):
        mixes = [
            Priced("", rng.uniform(1, 5), rng.uniform(5, 20), rng.randint(1, 9))
            for _ in range(rng.randint(1, 6))
        ]
        base = rng.uniform(0.02, 0.2)
        found = crossing_usd(mixes, base)
        if max(each.rate / each.fixed_usd for each in mixes) < base:
            assert found < 0
            continue
        low, high = 0.0, 1e4
        while high - low > 1e-7:
            middle = (low + high) / 2
            if max(each.rate / each.usd(middle) for each in mixes) >= base:
                low = middle
            else:
                high = middle
        assert found == pytest.approx(low, abs=1e-5)
        assert best_at(mixes, max(found, 1e-3)).per_usd(max(found, 1e-3)) == pytest.approx(
            base, rel=1e-3
        )


def test_break_even_is_offers_bought_at_every_price(seed: int) -> None:
    """Each point of a line against offers of a catalogue with that price."""
    rng, known = random.Random(seed), catalogue.load()
    site = Site(hbm_cards=rng.randint(1, 2), gddr_cards=rng.choice([1, 2]), link="200g")
    ours = [served(any_offer(rng, known, site, "ours"), rng.uniform(1, 9)) for _ in range(4)]
    beside = {
        "pd-bf16": [served(any_offer(rng, known, site, "pd-bf16"), 3.0) for _ in range(2)],
        "colocated": [served(any_offer(rng, known, site, "colocated"), 0.0)],
    }
    hbm_usd = known.card(site.hbm).price_usd.value
    ratios, own = ratios_of(known.card(site.gddr).price_usd.value / hbm_usd)
    state = state_of(known, site, [*ours, served(ours[0].offer, 0.0)], beside, ratios)
    assert [(line.baseline, line.basis) for line in state.lines] == [
        ("pd-bf16", "whole"),
        ("pd-bf16", "cards"),
    ]  # co-located serves nobody in time
    for index in {own, *rng.sample(range(len(ratios)), 10)}:
        then = repriced(known, site.gddr, ratios[index] * hbm_usd)
        again = [
            Answer(
                offer(then, SHAPE, site, "ours", each.offer.prefill, each.offer.decode),
                each.goodput,
            )
            for each in ours
        ]
        best = max(again, key=lambda each: each.per_dollar)
        base = max(each.per_dollar for each in beside["pd-bf16"])
        assert state.lines[0].over[index] == pytest.approx(best.per_dollar / base)
        assert state.mixes[index] == best.offer.mix
        assert state.usd[index] == pytest.approx(best.offer.price_usd)
        assert state.rates[index] == best.goodput.rate
        cards = [
            max(a.goodput.rate / a.offer.cards_usd for a in some)
            for some in (again, beside["pd-bf16"])
        ]
        assert state.lines[1].over[index] == pytest.approx(cards[0] / cards[1])


def test_the_sliders_stand_at_the_catalogues_entries() -> None:
    known = catalogue.load()
    names = efficiencies_of(known, Site())
    values = [known.efficiencies[name].value for name in names]
    assert "tenstorrent-one-chip" in names and "tenstorrent-memory" not in names
    assert values == sorted(values) and len(names) >= 5
    for own in (0.001, 0.12, 3.0):
        ratios, at = ratios_of(own)
        assert ratios[at] == own and ratios[0] < own < ratios[-1]
