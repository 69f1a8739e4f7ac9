"""What was compared, with all that is needed to ask more about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sglang_hma.planner import parallel
from sglang_hma.planner.catalogue import Catalogue
from sglang_hma.planner.model_shape import ModelShape
from sglang_hma.planner.report import By, Comparison
from sglang_hma.planner.search import Budget, Question

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[str, int], Callable[[], object]]
"""Told what is simulated and how many times; what it returns is called after each."""


def silent(what: str, total: int) -> Callable[[], object]:
    return lambda: None


@dataclass(frozen=True)
class Subject:
    """processes: side by side; None: as many as there are CPUs."""

    catalogue: Catalogue
    shape: ModelShape
    budget: Budget
    question: Question
    comparison: Comparison
    by: By
    processes: int | None = None
    progress: Progress = silent

    def each(self, what: str, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """In the order of `items`. function: what can be pickled."""
        advance = self.progress(what, len(items))
        return parallel.each(
            function, items, processes=self.processes, heard=lambda index, result: advance()
        )
