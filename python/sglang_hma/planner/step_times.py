"""How long an instance's steps take, whoever knows it: measured tables, rooflines, a fit."""

from dataclasses import dataclass
from typing import Protocol

from sglang_hma.planner.catalogue import Figure

Part = tuple[int, int]
"""Of one prompt in a prefill pass: tokens to compute, tokens before them."""


class StepTimes(Protocol):
    """Of one instance: the cards that hold the model once. Seconds."""

    @property
    def used(self) -> tuple[Figure, ...]:
        """The figures that its answers rest on."""
        ...

    def prefill_s(self, *parts: Part, beside: int = 0) -> float:
        """Of a pass over parts of one or more prompts. beside: requests that decode a token in the
        same pass: its products, without its attention."""
        ...

    def decode_s(self, batch: int, prompt_tokens: float, new_tokens: float = 0) -> float:
        """Of a step of `batch` requests that see so many tokens together."""
        ...


@dataclass(frozen=True)
class Affine:
    """Seconds a pass, a token of it, a pair of tokens of which one sees the other; and a decode
    step, a request in it, a token that its requests see."""

    pass_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0
    step_s: float = 0.0
    request_s: float = 0.0
    seen_s: float = 0.0
    used: tuple[Figure, ...] = ()

    def prefill_s(self, *parts: Part, beside: int = 0) -> float:
        tokens = sum(new for new, _ in parts) + beside
        pairs = sum(new * (before + (new + 1) / 2) for new, before in parts)
        return self.pass_s + self.token_s * tokens + self.pair_s * pairs

    def decode_s(self, batch: int, prompt_tokens: float, new_tokens: float = 0) -> float:
        return self.step_s + self.request_s * batch + self.seen_s * (prompt_tokens + new_tokens)


@dataclass(frozen=True)
class Dequantizing:
    """Another's times, and a pass that writes what it made once more: pages in BF16.

    The card's memory reads and writes these bytes, and nothing else goes on.
    """

    times: StepTimes
    token_s: float
    used: tuple[Figure, ...]

    def prefill_s(self, *parts: Part, beside: int = 0) -> float:
        made = self.token_s * sum(new for new, _ in parts)
        return self.times.prefill_s(*parts, beside=beside) + made

    def decode_s(self, batch: int, prompt_tokens: float, new_tokens: float = 0) -> float:
        return self.times.decode_s(batch, prompt_tokens, new_tokens)
