"""Cards, hosts, links and efficiencies, each figure with its kind and source."""

import importlib.resources
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from sglang_hma.planner.problem import Problem

Kind = Literal["measured", "quoted", "second-hand", "inferred", "assumed"]
Vendor = Literal["nvidia", "tenstorrent"]


class CatalogueError(Problem):
    """One line: the file, the place in it and what is wrong."""


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number and how far it is to be trusted. low, high: what it may be instead, if known."""

    value: float
    kind: Kind
    source: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"value is {self.value}: needs more than 0")
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        if not 0 < low <= self.value <= high:
            raise ValueError(f"value is {self.value}: needs to lie between low and high")


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one card, all its chips together. tflops: dense, by the format of the products."""

    title: str
    vendor: Vendor
    memory_gb: Figure
    bandwidth_gb_s: Figure
    tflops: dict[str, Figure]
    watts: Figure
    price_usd: Figure
    rent_usd_h: Figure | None = None
    chips: int = 1


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one card needs around it."""

    title: str
    price_usd: Figure
    watts: Figure
    bus_gb_s: Figure
    """What it reads from a card."""


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: str
    gb_s: Figure
    price_usd: Figure


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cards: dict[str, Card] = {}
    hosts: dict[str, Host] = {}
    links: dict[str, Link] = {}
    efficiencies: dict[str, Figure] = {}

    def card(self, name: str) -> Card:
        """Raises CatalogueError if there is none of that name."""
        if name not in self.cards:
            known = ", ".join(sorted(self.cards))
            raise CatalogueError(f"card {name!r} is not in the catalogue; it has {known}")
        return self.cards[name]

    def with_others(self, other: "Catalogue") -> "Catalogue":
        """This one with another's entries, which replace those of the same name."""
        return Catalogue(
            **{
                name: getattr(self, name) | getattr(other, name)
                for name in ("cards", "hosts", "links", "efficiencies")
            }
        )


def load(*files: Path) -> Catalogue:
    """The package's catalogue with the entries of `files`, later ones over earlier ones.

    Raises CatalogueError.
    """
    package = importlib.resources.files("sglang_hma.planner")
    found = parse((package / "catalogue.yaml").read_text(encoding="utf-8"), "catalogue.yaml")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CatalogueError(f"{file}: {error}") from error
        found = found.with_others(parse(text, str(file)))
    return found


def parse(text: str, name: str) -> Catalogue:
    """`name` stands in the message of a CatalogueError."""
    try:
        return msgspec.convert(yaml.safe_load(text) or {}, Catalogue)
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        raise CatalogueError(f"{name}: {' '.join(str(error).split())}") from error
