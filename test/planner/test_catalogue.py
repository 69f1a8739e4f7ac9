"""The catalogue says where each figure is from, and a typo is one clear line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang_hma.planner import catalogue
from sglang_hma.planner.catalogue import CatalogueError, Figure

CARD = """
cards:
  mine:
    title: My card
    vendor: nvidia
    memory_gb: {value: 24, kind: quoted, source: its box}
    bandwidth_gb_s: {value: 900, kind: quoted, source: its box}
    tflops: {bf16: {value: 70, kind: measured, source: here}}
    watts: {value: 300, kind: quoted, source: its box}
    price_usd: {value: 500, low: 400, high: 700, kind: second-hand, source: an auction}
"""


def figures(of: Any) -> Iterator[Figure]:
    if isinstance(of, Figure):
        yield of
    elif isinstance(of, dict):
        for each in of.values():
            yield from figures(each)
    elif isinstance(of, msgspec.Struct):
        for name in of.__struct_fields__:
            yield from figures(getattr(of, name))


def test_every_figure_has_a_source() -> None:
    found = list(figures(catalogue.load()))
    assert len(found) > 60
    assert all(figure.source.strip() for figure in found)
    assert all(
        figure.low and figure.high
        for figure in found
        if figure.kind == "second-hand" and "offers" in figure.source
    )


def test_a_users_file_adds_and_replaces(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        CARD.replace("mine:", "l40s:") + CARD.removeprefix("\ncards:\n")
    )
    found = catalogue.load(tmp_path / "mine.yaml")
    assert found.card("mine").title == found.card("l40s").title == "My card"
    assert found.card("h100-sxm") == catalogue.load().card("h100-sxm")


def test_an_unknown_card_is_told_the_known_ones() -> None:
    with pytest.raises(CatalogueError, match=r"card 'p1500' is not in the catalogue.*p150"):
        catalogue.load().card("p1500")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("memory_gb", "memory_gbs", "memory_gbs"),
        ("vendor: nvidia", "vendor: amd", "amd"),
        ("value: 24", "value: many", "memory_gb"),
        ("value: 24", "value: -24", "more than 0"),
        ("low: 400", "low: 600", "between low and high"),
        ("kind: measured", "kind: guessed", "guessed"),
        (", source: its box", "", "source"),
        ("cards:", "card:", "card"),
        ("title: My card", "title: [", "line"),
    ],
)
def test_a_typo_is_one_line(tmp_path: Path, before: str, after: str, words: str) -> None:
    assert before in CARD
    file = tmp_path / "mine.yaml"
    file.write_text(CARD.replace(before, after, 1))
    with pytest.raises(CatalogueError) as error:
        catalogue.load(file)
    said = str(error.value)
    assert said.startswith(str(file)) and words in said and "\n" not in said


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"none\.yaml"):
        catalogue.load(tmp_path / "none.yaml")
