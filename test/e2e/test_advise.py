"""The planner's advice, from the metrics of servers that answer."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.live import sources
from sglang_hma.planner.live.advice import advise
from sglang_hma.planner.live.roles import see

from .client import generate
from .harness import Pair, until

pytestmark = pytest.mark.e2e

REQUESTS, TOKENS = 24, 12


def test_what_a_pair_did_is_seen(pair: Pair, seed: int) -> None:
    """Counts to the last request and token; shares, which depend on the machine, within bounds."""
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(8, 4000) for _ in range(draw.randint(40, 200))] for _ in range(REQUESTS)
    ]

    def computed() -> float:
        return pair.prefill.metric("sglang:scheduler_stage_seconds_total")

    def load(_: float) -> None:
        before = computed()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda prompt: generate(pair.url, prompt, TOKENS), prompts))
        # The scheduler adds to it a second after the last time, when something wakes it.
        until(lambda: pair.prefill.wait_healthy() and computed() > before, pair.prefill)

    seen = see(sources.scrape([pair.prefill.url, pair.decode.url], 0.0, sleep=load))
    prefill, decode = seen.prefill, seen.decode
    assert prefill.servers == (f"{pair.prefill.url}/metrics",)
    assert decode.servers == (f"{pair.decode.url}/metrics",)
    assert decode.requests == REQUESTS
    assert prefill.requests_s * seen.seconds == pytest.approx(REQUESTS, rel=0.05)
    assert decode.prompt_tokens == pytest.approx(sum(map(len, prompts)) / REQUESTS)
    assert decode.output_tokens == TOKENS
    assert decode.ttft.count == decode.tpot.count == REQUESTS
    assert 0 < decode.tpot.mean < decode.ttft.mean + decode.tpot.total
    assert decode.tokens_s * seen.seconds == pytest.approx(REQUESTS * (TOKENS - 1), rel=0.1)
    assert 0 < decode.batch <= 4
    assert prefill.busy is not None
    assert 0 < prefill.busy[0] <= 1
    assert 0 <= decode.running[0] < 1
    found = advise(seen, Objectives(3600.0, 3600.0), 0.8)
    assert found is not None
    assert (found.prefill.there, found.decode.there) == (1, 1)
    assert found.prefill.load.instances == pytest.approx(prefill.busy[0] * (1 + found.growth))
