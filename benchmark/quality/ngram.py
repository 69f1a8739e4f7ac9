"""A 3-gram model with interpolated Kneser-Ney smoothing: what train.py's model must be better than.

Chen and Goodman, An Empirical Study of Smoothing Techniques (1999), with one discount for each
order, n1 / (n1 + 2 n2), or 1/2 where nothing was seen once.
"""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Counts:
    """How often each n-gram follows its history, and for each history how many different ones do.

    An n-gram is a number in base `vocab`, its last token the last digit.
    """

    def __init__(self, grams: Ids, counts: Ids, vocab: int) -> None:
        self.grams, self.counts = grams, counts
        histories, at = np.unique(grams // vocab, return_inverse=True)
        self.histories = histories
        self.totals = np.bincount(at, weights=counts)
        self.followers = np.bincount(at)
        once, twice = (int((counts == n).sum()) for n in (1, 2))
        self.discount = once / (once + 2 * twice) if once else 0.5

    def discounted(
        self, grams: Ids, vocab: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The n-grams' own part of the probability, and the weight of the shorter one's."""
        count = _look_up(self.grams, self.counts, grams)
        total = _look_up(self.histories, self.totals, grams // vocab)
        followers = _look_up(self.histories, self.followers, grams // vocab)
        known = np.maximum(total, 1)
        own = np.maximum(count - self.discount, 0) / known
        return own, np.where(total > 0, self.discount * followers / known, 1.0)


def _look_up(keys: Ids, values: npt.NDArray[np.generic], wanted: Ids) -> npt.NDArray[np.float64]:
    """values[i] where keys[i] == wanted, else 0. `keys` ascend."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0).astype(np.float64)


def perplexity(training: Ids, held_out: Ids, vocab: int) -> float:
    """Of `held_out`, from its third token on."""
    trigrams, counts = np.unique(_grams(training, 3, vocab), return_counts=True)
    three = Counts(trigrams, counts, vocab)
    # Of shorter n-grams it counts in how many different contexts they were seen.
    bigrams, contexts = np.unique(trigrams % vocab**2, return_counts=True)
    two = Counts(bigrams, contexts, vocab)
    ends = np.bincount(bigrams % vocab, minlength=vocab).astype(np.float64)
    wanted = _grams(held_out, 3, vocab)
    one = (ends / ends.sum() * 0.999 + 0.001 / vocab)[wanted % vocab]
    own, rest = two.discounted(wanted % vocab**2, vocab)
    shorter = own + rest * one
    own, rest = three.discounted(wanted, vocab)
    return float(np.exp(-np.log(own + rest * shorter).mean()))


def _grams(ids: Ids, n: int, vocab: int) -> Ids:
    ids = ids.astype(np.int64)
    return sum(ids[i : len(ids) - n + 1 + i] * vocab ** (n - 1 - i) for i in range(n))
