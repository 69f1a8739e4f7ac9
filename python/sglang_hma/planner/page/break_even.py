"""Goodput per dollar of ours over a baseline's, by price ratio, efficiency and link.

Efficiencies and links are the catalogue's, and each pair of them is simulated. A price changes no
simulation: it is arithmetic on goodput.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sglang_hma.planner.catalogue import Catalogue
from sglang_hma.planner.page.data import BreakEven, Choice, Line, State
from sglang_hma.planner.page.prices import Priced, best_at, crossing_usd, price_of
from sglang_hma.planner.page.subject import Subject
from sglang_hma.planner.search import Answer, mixes
from sglang_hma.planner.systems import COLOCATED, Site, System

BASELINES: tuple[System, ...] = ("pd-bf16", *COLOCATED)
BASES = ("whole", "cards")
RATIOS = 120  # positions of the price's slider, besides the catalogue's own
LEAST, MOST = 0.02, 1.0  # of the ratio; wider where the catalogue's own is near or beyond them

Place = tuple[System, Site]


def break_even(subject: Subject) -> BreakEven | None:
    """None where ours or every baseline was left out of the comparison."""
    catalogue, site = subject.catalogue, subject.comparison.site
    compared = {each.offer.system for each in subject.comparison.answers}
    baselines = [name for name in BASELINES if name in compared]
    if "ours" not in compared or not baselines:
        return None
    efficiencies = efficiencies_of(catalogue, site)
    links = sorted(catalogue.links, key=lambda name: catalogue.links[name].gb_s.value)
    places: list[Place] = [
        ("ours", replace(site, efficiency=efficiency, link=link))
        for efficiency in efficiencies
        for link in links
    ]
    # Homogeneous PD has no GDDR card; co-located cards have no link either.
    at: dict[System, Callable[[str], Site]] = dict.fromkeys(COLOCATED, lambda _: site)
    at["pd-bf16"] = lambda link: replace(site, link=link)
    places += [(name, at[name](link)) for name in baselines for link in links]
    found = _answers(subject, places)
    hbm_usd = catalogue.card(site.hbm).price_usd.value
    ratios, ratio_at = ratios_of(catalogue.card(site.gddr).price_usd.value / hbm_usd)

    def state(efficiency: str, link: str) -> State:
        where = replace(site, efficiency=efficiency, link=link)
        beside: dict[str, list[Answer]] = {name: found[name, at[name](link)] for name in baselines}
        return state_of(catalogue, where, found["ours", where], beside, ratios)

    return BreakEven(
        hbm_usd=hbm_usd,
        ratios=ratios,
        efficiencies=[_efficiency(catalogue, name) for name in efficiencies],
        links=[_link(catalogue, name) for name in links],
        states=[[state(efficiency, link) for link in links] for efficiency in efficiencies],
        ratio_at=ratio_at,
        efficiency_at=efficiencies.index(site.efficiency),
        link_at=links.index(site.link),
    )


def efficiencies_of(catalogue: Catalogue, site: Site) -> list[str]:
    """Names of the compute efficiencies of the GDDR card's vendor, from low to high."""
    vendor = catalogue.card(site.gddr).vendor
    names = {name for name in catalogue.efficiencies if name.startswith(f"{vendor}-")}
    names = names - {f"{vendor}-memory"} | {site.efficiency}
    return sorted(names, key=lambda name: (catalogue.efficiencies[name].value, name))


def ratios_of(own: float) -> tuple[list[float], int]:
    """Equal steps of the logarithm with `own` among them, and the index of that."""
    grid = np.geomspace(min(LEAST, own / 4), max(MOST, own * 4), RATIOS)
    ratios = sorted({*map(float, grid), own})
    return ratios, ratios.index(own)


def state_of(
    catalogue: Catalogue,
    site: Site,
    ours: Sequence[Answer],
    beside: Mapping[str, Sequence[Answer]],
    ratios: Sequence[float],
) -> State:
    """ours: at `site`. beside: by baseline; one that keeps no objective gets no line."""
    priced: dict[str, list[Priced]] = {basis: [] for basis in BASES}
    for each in ours:
        if each.goodput.possible:
            price = price_of(catalogue, site, each.offer)
            for basis, fixed in (("whole", price.usd - price.gddr_usd), ("cards", price.hbm_usd)):
                priced[basis].append(
                    Priced(each.offer.mix, each.goodput.rate, fixed, price.gddr_cards)
                )
    if not priced["whole"]:
        return State()
    hbm_usd = catalogue.card(site.hbm).price_usd.value
    prices = [ratio * hbm_usd for ratio in ratios]
    lines = []
    for name, answers in beside.items():
        for basis in BASES:
            base = max((_per_usd(each, basis) for each in answers), default=0.0)
            if base:
                over = [best_at(priced[basis], usd).per_usd(usd) / base for usd in prices]
                crossing = crossing_usd(priced[basis], base) / hbm_usd
                lines.append(Line(name, basis, over, crossing))
    best = [best_at(priced["whole"], usd) for usd in prices]
    return State(
        mixes=[each.mix for each in best],
        usd=[each.usd(usd) for each, usd in zip(best, prices, strict=True)],
        rates=[each.rate for each in best],
        lines=lines,
    )


def _per_usd(answer: Answer, basis: str) -> float:
    offer = answer.offer
    return answer.goodput.rate / (offer.price_usd if basis == "whole" else offer.cards_usd)


def _answers(subject: Subject, places: Sequence[Place]) -> dict[Place, list[Answer]]:
    """Of every mix that the budget allows there; those of the comparison are not asked again."""
    known = subject.comparison
    found: dict[Place, list[Answer]] = {}
    new = []
    for place in places:
        system, site = place
        if place in found:
            continue
        if site == known.site:
            found[place] = [each for each in known.answers if each.offer.system == system]
            continue
        found[place] = []
        offers = mixes(subject.catalogue, subject.shape, site, system, subject.budget)
        new += [(place, offer) for offer in offers]
    goodputs = subject.each(
        "efficiencies and links", subject.question.ask, [offer for _, offer in new]
    )
    for (place, offer), goodput in zip(new, goodputs, strict=True):
        found[place].append(Answer(offer, goodput))
    return found


def _efficiency(catalogue: Catalogue, name: str) -> Choice:
    figure = catalogue.efficiencies[name]
    return Choice(
        name, f"{figure.value * 100:.3g}% of peak", figure.value, figure.kind, figure.source
    )


def _link(catalogue: Catalogue, name: str) -> Choice:
    figure = catalogue.links[name].gb_s
    return Choice(name, catalogue.links[name].title, figure.value, figure.kind, figure.source)
