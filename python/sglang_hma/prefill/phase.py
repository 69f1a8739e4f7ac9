"""Weights that differ between prefill and decode, on a server that does both.

Such a server holds both sets and points the parameters at the one that a forward needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch.nn import Parameter


@dataclass
class PhaseWeights:
    """Parameters whose data differ between prefill and decode."""

    sets: list[tuple[Parameter, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    in_prefill: bool = False

    def add(self, parameter: Parameter, *, prefill: torch.Tensor, decode: torch.Tensor) -> None:
        self.sets.append((parameter, prefill, decode))

    def enter(self, *, prefill: bool) -> None:
        if self.in_prefill == prefill:
            return
        for parameter, for_prefill, for_decode in self.sets:
            parameter.data = for_prefill if prefill else for_decode
        self.in_prefill = prefill


weights = PhaseWeights()
as_stored = ContextVar("as_stored", default=False)


@contextmanager
def weights_as_stored() -> Iterator[None]:
    """prefill.reference leaves models alone that are loaded meanwhile: those that only draft."""
    token = as_stored.set(True)
    try:
        yield
    finally:
        as_stored.reset(token)
