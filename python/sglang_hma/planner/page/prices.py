"""What a mix costs, by part, and at which price of the GDDR card it breaks even."""

from collections.abc import Iterable
from typing import NamedTuple

from sglang_hma.planner.catalogue import Catalogue
from sglang_hma.planner.page.data import Price
from sglang_hma.planner.systems import HOSTS, Offer, Site


def price_of(catalogue: Catalogue, site: Site, offer: Offer) -> Price:
    """The parts of `offer.price_usd`. site: the one that the offer was made for."""
    cheap = on_gddr(offer.system)
    gddr = offer.prefill * site.gddr_cards if cheap else 0
    hbm = (offer.decode + (0 if cheap else offer.prefill)) * site.hbm_cards
    hosts = sum(
        number * catalogue.hosts[HOSTS[catalogue.card(name).vendor]].price_usd.value
        for name, number in ((site.hbm, hbm), (site.gddr, gddr))
        if number
    )
    nics = offer.prefill + offer.decode if offer.prefill else 0
    return Price(
        hbm_usd=hbm * catalogue.card(site.hbm).price_usd.value,
        gddr_usd=gddr * catalogue.card(site.gddr).price_usd.value if gddr else 0.0,
        gddr_cards=gddr,
        hosts_usd=hosts,
        nics_usd=nics * catalogue.links[site.link].price_usd.value,
    )


def on_gddr(system: str) -> bool:
    """Whether its prefill is on GDDR cards."""
    return system == "ours" or system.startswith("hetero")


class Priced(NamedTuple):
    """A mix's goodput in requests/s, its price without GDDR cards, and how many of these it has.

    card_usd: of one of them.
    """

    mix: str
    rate: float
    fixed_usd: float
    gddr_cards: int

    def usd(self, card_usd: float) -> float:
        return self.fixed_usd + self.gddr_cards * card_usd

    def per_usd(self, card_usd: float) -> float:
        return self.rate / self.usd(card_usd)


def best_at(mixes: Iterable[Priced], card_usd: float) -> Priced:
    """That with the most goodput per dollar where a GDDR card costs so much."""
    return max(mixes, key=lambda each: each.per_usd(card_usd))


def crossing_usd(mixes: Iterable[Priced], per_usd: float) -> float:
    """The price of a GDDR card at which the best mix gives `per_usd` requests/s for a dollar.

    Of one mix: (rate / per_usd - fixed_usd) / gddr_cards. What each gives for a dollar falls as the
    price rises, so that of all is the highest. Not above 0 if all give less even with free cards.
    """
    return max((each.rate / per_usd - each.fixed_usd) / each.gddr_cards for each in mixes)
