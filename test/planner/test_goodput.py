"""Goodput against fleets whose capacity is known."""

import random

import numpy as np
import pytest

from benchmark.planner.fleets import pair
from sglang_hma.planner import goodput, scaled
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.step_times import Affine
from sglang_hma.planner.trace import Request

EVEN = [Request(float(i), 1000, 11) for i in range(400)]


def test_a_regular_stream_runs_at_capacity() -> None:
    """A prompt a second: at any lower rate nobody waits, at a higher one the queue grows."""
    found = goodput.of(pair(max_prompts=1), EVEN, Objectives(1.2, 0.02), tolerance=0.005)
    # Of 400 requests the last tenth may be late: the queue grows by 0.2 s over the first nine.
    assert found.rate == pytest.approx(1.0, rel=0.01)
    assert found.unloaded == 1.0


def test_objectives_that_nobody_keeps_are_impossible() -> None:
    found = goodput.of(pair(), EVEN, Objectives(0.5, 0.02))
    assert not found.possible
    assert found.unloaded == 0.0


def test_a_rhythm_that_no_rate_makes_possible() -> None:
    """All come at once, at any rate: the last waits for all others."""
    at_once = [Request(0.0, 1000, 11)] * 50
    found = goodput.of(pair(max_prompts=1), at_once, Objectives(1.2, 0.02))
    assert (found.rate, found.possible, found.unloaded) == (0.0, False, 1.0)


def test_scaled_objectives_are_what_a_share_has_alone(seed: int) -> None:
    """Of prompts that come together and are asked one by one: a millisecond a token."""
    rng = random.Random(seed)
    tokens = [rng.randrange(100, 1000) for _ in range(300)]
    requests = [Request(0.0, each, 11) for each in tokens]
    share = rng.uniform(0.5, 0.95)
    fleet = pair(prefill_times=Affine(token_s=1e-3), decode_times=Affine(step_s=0.02))
    found = scaled.objectives(fleet, requests, share)
    assert found.ttft_s == pytest.approx(5e-3 * np.quantile(tokens, share), rel=1e-3)
    assert found.tpot_s == pytest.approx(3 * 0.02)
    assert found.share == share


def test_two_fleets_of_one_and_one_of_two() -> None:
    one, two = (
        goodput.of(
            pair(prefill_instances=n, max_prompts=1),
            EVEN,
            Objectives(1.2, 0.02),
            tolerance=0.005,
            policy="round_robin",
        ).rate
        for n in (1, 2)
    )
    assert two == pytest.approx(2 * one, rel=0.02)


def test_seeds_give_an_interval_and_the_same_result() -> None:
    trace = [Request(i * 1.0, 100 + 900 * (i % 7 == 0), 11) for i in range(3000)]
    fleet = pair()
    first, again = (
        goodput.of(fleet, trace, Objectives(1.0, 0.02), seeds=3, count=500) for _ in range(2)
    )
    assert first == again
    assert len(first.by_seed) == 3
    assert first.half_width >= 0
    assert min(first.by_seed) <= first.rate <= max(first.by_seed)


@pytest.mark.parametrize("count", [200, 400])
def test_an_excerpt_is_judged_amid_others(count: int) -> None:
    """A step takes 10 ms and half a millisecond a request: 50 ms with 80, of which each stays for
    100 steps, so 16 a second come and go. Nobody is served faster as the first or the last."""
    times = Affine(step_s=0.01, request_s=0.0005)
    fleet = pair(prefill_times=Affine(), decode_times=times)
    trace = [Request(i * 1.0, 10, 101) for i in range(400)]
    found = goodput.of(fleet, trace, Objectives(1.0, 0.05), count=count, tolerance=0.005)
    assert found.rate == pytest.approx(16.0, rel=0.03)
