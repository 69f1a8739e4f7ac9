"""Scores of documents under two policies, and intervals over the documents."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

RESAMPLES = 10_000
Interval = tuple[float, float, float]  # estimate, and the ends of its 95% interval


@dataclass(frozen=True)
class Score:
    """Sums over a document's scored tokens, against the yardstick's on the same tokens."""

    tokens: int
    nll: float  # nats
    kl: float  # nats, KL(yardstick || this)
    agreed: int  # tokens whose most likely token is the yardstick's
    until: int  # scored tokens before the first that is not


def score(logits: torch.Tensor, yardstick: torch.Tensor, ids: torch.Tensor) -> Score:
    """logits, yardstick: float32 [n, vocabulary]; ids: int64 [n], what came."""
    own, base = (torch.log_softmax(x, -1) for x in (logits, yardstick))
    same = logits.argmax(-1) == yardstick.argmax(-1)
    n = len(ids)
    return Score(
        tokens=n,
        nll=float(-own[torch.arange(n), ids].sum(dtype=torch.float64)),
        kl=float((base.exp() * (base - own)).sum(dtype=torch.float64)),
        agreed=int(same.sum()),
        until=n if bool(same.all()) else int((~same).to(torch.int8).argmax()),
    )


@dataclass(frozen=True)
class Comparison:
    """Of a policy with the yardstick over documents; intervals by resampling documents, in which
    both are scored on the same (paired bootstrap)."""

    tokens: int
    perplexity: float
    perplexity_change: Interval  # relative
    kl: Interval  # nats a token
    disagreement: Interval  # of the most likely token
    until: float  # median of documents


def compare(scores: list[Score], yardstick: list[Score], seed: int) -> Comparison:
    """`scores[i]` and `yardstick[i]` are of one document. Resampling depends on `seed` alone."""
    count = len(scores)
    picks = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    tokens = _column(scores, lambda s: s.tokens)
    nll, base = _column(scores, lambda s: s.nll), _column(yardstick, lambda s: s.nll)
    kl, missed = _column(scores, lambda s: s.kl), _column(scores, lambda s: s.tokens - s.agreed)

    def interval(sums: npt.NDArray[np.float64], exponential: bool = False) -> Interval:
        """Of a sum over documents by their tokens."""
        means = [sums.sum() / tokens.sum(), *(sums[picks].sum(1) / tokens[picks].sum(1))]
        values = np.expm1(means) if exponential else np.asarray(means)
        low, high = np.quantile(values[1:], [0.025, 0.975])
        return float(values[0]), float(low), float(high)

    return Comparison(
        tokens=int(tokens.sum()),
        perplexity=float(np.exp(nll.sum() / tokens.sum())),
        perplexity_change=interval(nll - base, exponential=True),
        kl=interval(kl),
        disagreement=interval(missed),
        until=float(np.median([s.until for s in scores])),
    )


def _column(scores: list[Score], of: Callable[[Score], float]) -> npt.NDArray[np.float64]:
    return np.array([of(s) for s in scores], dtype=np.float64)
