"""Formats by their definitions, and statistics against closed forms."""

import math
import random

import numpy as np
import pytest
import torch

from benchmark.quality import ngram
from benchmark.quality.mcnemar import paired
from benchmark.quality.policies import bfp4, fp8_per_tensor, fp8_per_token, integer
from benchmark.quality.statistics import Score, compare, score


def e4m3_values() -> np.ndarray:
    """Every finite value of FP8 e4m3: bias 7, no infinities, 1111.111 is NaN."""
    found = []
    for bits in range(127):
        exponent, mantissa = bits >> 3, bits & 7
        found.append(
            mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        )
    return np.array(found)


def nearest(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance to the nearest of `values`, by magnitude."""
    return np.abs(np.abs(x)[..., None] - values).min(-1)


@pytest.mark.parametrize("whole", [True, False])
def test_fp8_is_the_nearest_of_its_values(seed: int, whole: bool) -> None:
    torch.manual_seed(seed)
    x = torch.randn(9, 3, 32) * torch.logspace(-3, 2, 9)[:, None, None]
    rounded = (fp8_per_tensor if whole else fp8_per_token)(x).numpy().astype(np.float64)
    plain = x.numpy().astype(np.float64)
    largest = np.abs(plain).max() if whole else np.abs(plain).max(-1, keepdims=True)
    scale = largest / 448
    best = nearest(e4m3_values(), plain / scale) * scale
    assert (np.abs(rounded - plain) <= best + 1e-6 * np.abs(plain)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_the_nearest_multiples(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(7, 2, 64)
    rounded = integer(bits)(x)
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((rounded - x).abs() <= step * 0.5001).all()
    multiples = rounded / step
    assert torch.allclose(multiples, multiples.round(), atol=1e-3)
    assert integer(bits)(torch.zeros(1, 1, 32)).eq(0).all()


def test_bfp4_has_three_bits_below_the_largest_exponent(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5, 2, 64) * torch.logspace(-4, 4, 5)[:, None, None]
    rounded = bfp4(x)
    for group, kept in zip(x.reshape(-1, 16), rounded.reshape(-1, 16), strict=True):
        step = 2.0 ** (math.floor(math.log2(float(group.abs().max()))) - 2)
        assert torch.equal(kept, (kept / step).round() * step)
        assert ((kept / step).abs() <= 7).all()
        close = (group / step).abs() <= 7
        assert ((kept - group).abs()[close] <= step / 2).all()


def test_scores_are_their_definitions(seed: int) -> None:
    torch.manual_seed(seed)
    base, own = torch.randn(2, 20, 50)
    ids = torch.randint(0, 50, (20,))
    found = score(own, base, ids)
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (base, own))
    assert found.kl == pytest.approx(float(torch.distributions.kl_divergence(p, q).sum()), rel=1e-5)
    assert found.nll == pytest.approx(-float(q.log_prob(ids).sum()), rel=1e-5)
    same = (base.argmax(-1) == own.argmax(-1)).tolist()
    assert found.agreed == sum(same) and found.until == same.index(False)
    itself = score(base, base, ids)
    assert itself.kl == 0 and itself.agreed == itself.until == 20


def test_intervals_cover_what_they_should(seed: int) -> None:
    """Of a normal mean, about 94 times in 100: 75 or fewer has a chance below one in a billion."""
    rng = random.Random(seed)
    covered = 0
    for _ in range(100):
        scores, base = [], []
        for _ in range(40):
            nll = rng.gauss(100, 10)
            base.append(Score(50, nll, 0, 50, 50))
            scores.append(Score(50, nll + rng.gauss(0.5, 1), 0.1, 49, 3))
        found = compare(scores, base, seed=1)
        change, low, high = found.perplexity_change
        assert low <= change <= high
        covered += low <= math.expm1(0.5 / 50) <= high
        assert found.kl[0] == pytest.approx(0.1 / 50)
        assert found.disagreement[0] == pytest.approx(1 / 50)
    assert covered > 75


def test_the_trigram_model_is_a_distribution(seed: int) -> None:
    """The probabilities of all next tokens add up to 1, and a text it knows is easy."""
    rng = np.random.default_rng(seed)
    vocab = 7
    training = rng.integers(0, vocab, 300)
    history = rng.integers(0, vocab, 2)
    total = 0.0
    for token in range(vocab):
        total += 1 / ngram.perplexity(training, np.array([*history, token]), vocab)
    assert total == pytest.approx(1)
    cycle = np.arange(2000) % vocab
    assert ngram.perplexity(cycle, cycle[:100], vocab) < 1.1


def test_mcnemar_is_a_coin_tossed(seed: int) -> None:
    """p is the share of all ways to toss the differing questions that are at least as uneven."""
    rng = random.Random(seed)
    first, second = ([rng.random() < 0.7 for _ in range(30)] for _ in range(2))
    second[:18] = first[:18]  # 12 can differ
    found = paired(first, second)
    wins = [a for a, b in zip(first, second, strict=True) if a != b]
    n, uneven = len(wins), abs(2 * sum(wins) - len(wins))
    assert found.questions == 30 and found.only_first + found.only_second == n
    assert found.difference == pytest.approx((sum(first) - sum(second)) / 30)
    as_uneven = sum(abs(2 * bin(way).count("1") - n) >= uneven for way in range(2**n))
    assert found.p_value == pytest.approx(as_uneven / 2**n)
    gains = np.array(first, dtype=float) - np.array(second, dtype=float)
    assert found.error == pytest.approx(gains.std() / 30**0.5)
    assert paired(first, first).p_value == 1
