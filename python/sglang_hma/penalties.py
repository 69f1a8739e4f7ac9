"""Penalties come in one order, in every process.

SGLang 0.5.23 keeps their classes in a set, whose order differs from process to process, and where
scheduling does not overlap it applies them in that order: a repetition penalty, which scales
logits, before or after those that are subtracted. Where scheduling overlaps it scales last.
"""

from collections.abc import Iterable
from typing import Any


def orchestrate(
    original: Any, orchestrator: Any, vocab_size: int, batch: Any, penalizers: Iterable[type]
) -> None:
    """Around BatchedPenalizerOrchestrator.__init__, which makes one of each class in order."""
    original(orchestrator, vocab_size, batch, sorted(penalizers, key=_order))


def _order(penalizer: Any) -> tuple[bool, str]:
    return bool(penalizer.is_multiplicative), penalizer.__name__
