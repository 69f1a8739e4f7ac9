"""Step times from operators that were measured on silicon: AIConfigurator's, as tables.

Tables of the known models lie in silicon_tables/, one file a card; `tabulate` makes them where
aiconfigurator-core is installed (the extra `planner`).
"""

import importlib.resources
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeVar

import msgspec

from sglang_hma.planner.catalogue import Figure
from sglang_hma.planner.roofline import Roofline

T = TypeVar("T")


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds, of one model on `cards` cards that share it by tensor parallelism, in BF16."""

    cards: int
    tokens: list[int]
    prefill_linear: list[float]
    """Of a pass over so many tokens: all but attention."""
    prefill_attention: list[float]
    """Of one prompt of so many tokens."""
    batches: list[int]
    decode_linear: list[float]
    contexts: list[int]
    decode_attention: list[list[float]]
    """By batch, then by tokens that each of its requests sees."""


class Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one card. source: the database and its version; its licence."""

    source: str
    models: dict[str, list[Table]]


@cache
def load(card: str) -> Tables | None:
    """A card's tables, None if there are none."""
    file = importlib.resources.files("sglang_hma.planner") / "silicon_tables" / f"{card}.json"
    if not file.is_file():
        return None
    return msgspec.json.decode(file.read_bytes(), type=Tables)


@dataclass(frozen=True)
class Silicon:
    """roof: the same instance's roofline, for its memory and its pages' format."""

    table: Table
    roof: Roofline
    source: str

    @property
    def used(self) -> tuple[Figure, ...]:
        memory = (self.roof.card.memory_gb,)
        speed = (self.roof.kv_speed,) if self.roof.kv_speed else ()
        return (*memory, *speed, Figure(1.0, "quoted", self.source))

    def prefill_s(self, *parts: tuple[int, int], beside: int = 0) -> float:
        """Of a pass over (new tokens, tokens before them) of each prompt.

        Attention is that of a prompt whose tokens see as many as these do; what even one token
        takes is taken once a pass.
        """
        table = self.table
        tokens = sum(new for new, _ in parts) + beside
        total = between(table.tokens, table.prefill_linear, tokens)
        least = table.prefill_attention[0]
        for new, before in parts:
            like = math.sqrt(2 * new * (before + (new + 1) / 2))
            found = between(table.tokens, table.prefill_attention, max(1.0, like), power=2)
            total += max(0.0, found - least)
        return total + least

    def decode_s(self, batch: int, prompt_tokens: float, new_tokens: float = 0) -> float:
        """Of a step of `batch` requests that see so many tokens together."""
        if batch not in self._of_batch:
            self._of_batch[batch] = self._between_batches(batch)
        total, row = self._of_batch[batch]
        tokens = prompt_tokens + new_tokens
        if not tokens:
            return total
        attention = between(self.table.contexts, row, tokens / batch)
        speed = 1.0 if self.roof.kv_speed is None else self.roof.kv_speed.value
        return total + attention * (prompt_tokens / speed + new_tokens) / tokens

    @cached_property
    def _of_batch(self) -> dict[int, tuple[float, list[float]]]:
        return {}

    def _between_batches(self, batch: int) -> tuple[float, list[float]]:
        """Of a step of so many requests: all but attention; attention by context."""
        table = self.table
        rows = _around(table.batches, table.decode_attention, batch)
        pair = _around(table.batches, table.batches, batch)
        if len(rows) > 1:
            row = [between(pair, values, batch) for values in zip(*rows, strict=True)]
        else:
            row = rows[0]
        return between(table.batches, table.decode_linear, batch), row


def times_of(card: str, roof: Roofline) -> "Silicon | Roofline":
    """By a table, where there is one of this card, model and number of cards."""
    tables = load(card)
    if tables is not None and roof.weights == "bf16":
        for table in tables.models.get(roof.shape.name, ()):
            if table.cards == roof.cards:
                return Silicon(table, roof, tables.source)
    return roof


def between(grid: Sequence[int], values: Sequence[float], at: float, *, power: int = 1) -> float:
    """On straight lines between the grid's points; beyond its end by that power of `at`."""
    if at >= grid[-1]:
        if power != 1:
            return values[-1] * (at / grid[-1]) ** power
        slope = (values[-1] - values[-2]) / (grid[-1] - grid[-2])
        return values[-1] + slope * (at - grid[-1])
    if at <= grid[0]:
        return values[0] if power == 1 else values[0] * (at / grid[0]) ** power
    right = bisect_left(grid, at)
    share = (at - grid[right - 1]) / (grid[right] - grid[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def _around(grid: Sequence[int], values: Sequence[T], at: float) -> list[T]:
    """The values at the grid's points next to `at`, one or two."""
    right = min(bisect_left(grid, at), len(grid) - 1)
    if grid[right] == at or right == 0:
        return [values[right]]
    return [values[right - 1], values[right]]
