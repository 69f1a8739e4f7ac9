"""Names and units of the figures that an answer rests on."""

from collections.abc import Iterator

import msgspec

from sglang_hma.planner.catalogue import Catalogue, Figure
from sglang_hma.planner.page.data import NamedFigure
from sglang_hma.planner.systems import Offer, Site

FIELDS = {
    "memory_gb": ("memory", "GB"),
    "bandwidth_gb_s": ("memory bandwidth", "GB/s"),
    "watts": ("power", "W"),
    "price_usd": ("price", "USD"),
    "rent_usd_h": ("rent", "USD/h"),
    "bus_gb_s": ("reads from a card", "GB/s"),
    "gb_s": ("line rate", "GB/s"),
}


def named(catalogue: Catalogue, site: Site, offer: Offer) -> list[NamedFigure]:
    """In the offer's order. What is not in the catalogue are step times that were measured."""
    names: dict[Figure, tuple[str, str]] = {}
    for figure, name, unit in _entries(catalogue, site):
        before = names.get(figure)
        names[figure] = (f"{before[0]}; {name}", unit) if before else (name, unit)
    found = []
    for figure in offer.used:
        known = figure in names
        name, unit = names.get(figure, ("step times", ""))
        found.append(
            NamedFigure(
                name,
                figure.value if known else None,
                unit,
                figure.kind,
                figure.source,
                figure.low,
                figure.high,
            )
        )
    return found


def _entries(catalogue: Catalogue, site: Site) -> Iterator[tuple[Figure, str, str]]:
    """Each figure that can matter at this site, its name and its unit."""
    cards = {site.hbm: catalogue.card(site.hbm)}
    if site.gddr in catalogue.cards:
        cards[site.gddr] = catalogue.card(site.gddr)
    for card in cards.values():
        yield from _fields(card, card.title)
        for format, figure in card.tflops.items():
            yield figure, f"{card.title}, {format.upper()} products", "TFLOP/s"
    for host in catalogue.hosts.values():
        yield from _fields(host, host.title)
    yield from _fields(catalogue.links[site.link], catalogue.links[site.link].title)
    for name, figure in catalogue.efficiencies.items():
        yield figure, name, ""


def _fields(entry: msgspec.Struct, title: str) -> Iterator[tuple[Figure, str, str]]:
    for field, (name, unit) in FIELDS.items():
        figure = getattr(entry, field, None)
        if figure is not None:
            yield figure, f"{title}, {name}", unit
