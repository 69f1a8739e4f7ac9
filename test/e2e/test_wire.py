"""Bytes on the wire, as SGLang counts them, against the format's arithmetic."""

import random

import pytest

from .client import generate
from .harness import Pair

pytestmark = pytest.mark.e2e

LAYERS, KV_HEADS, HEAD_DIM, PAGE = 4, 4, 64, 32


@pytest.mark.parametrize("length", [1, 32, 33, 200])
def test_transfer_is_eight_and_a_half_bits_an_element(pair: Pair, seed: int, length: int) -> None:
    before = total_mb(pair)
    rng = random.Random(seed)
    generate(pair.url, [rng.randrange(8, 4000) for _ in range(length)], 2)
    pages = -(-length // PAGE)
    elements = pages * PAGE * LAYERS * KV_HEADS * HEAD_DIM * 2
    moved = (total_mb(pair) - before) * 2**20
    assert moved == pytest.approx(elements * 1.0625, abs=0.5)


def total_mb(pair: Pair) -> float:
    return pair.prefill.metric("sglang:kv_transfer_total_mb_sum")
