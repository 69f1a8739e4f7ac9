"""The planner's advice, from the metrics of servers that answer."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.live import sources
from sglang_hma.planner.live.advice import advise
from sglang_hma.planner.live.roles import REQUESTS, TOKENS, see

from .client import payload
from .harness import Pair, until

pytestmark = pytest.mark.e2e

COUNT, MADE, CLIENTS = 24, 12, 4


def stream(url: str, prompt: list[int]) -> None:
    body = payload(prompt, MADE, stream=True)
    with requests.post(f"{url}/generate", json=body, stream=True) as reply:
        assert reply.status_code == 200
        assert sum(line.startswith(b"data:") for line in reply.iter_lines()) > 1


def test_what_a_pair_did_is_seen(pair: Pair, seed: int) -> None:
    """Counts to the last request; shares, which depend on the machine, within bounds."""
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(8, 4000) for _ in range(draw.randint(40, 200))] for _ in range(COUNT)
    ]

    def computed() -> float:
        stages = pair.prefill.metrics("sglang:scheduler_stage_seconds_total")
        return sum(value for labels, value in stages.items() if 'category="run_batch"' in labels)

    def load(_: float) -> None:
        before = computed()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda prompt: stream(pair.url, prompt), prompts))
        # The scheduler adds to it a second after the last time, when something wakes it.
        until(lambda: pair.prefill.wait_healthy() and computed() > before, pair.prefill)

    servers = sources.scrape([pair.prefill.url, pair.decode.url], 0.0, sleep=load)
    assert [server.increase(REQUESTS) for server in servers] == [COUNT, COUNT]
    # A health check is a request of one token, which is in no count of requests.
    assert servers[0].increase(TOKENS, "mode", "prefill_compute") >= sum(map(len, prompts))
    made = servers[1].increase(TOKENS, "mode", "decode")
    assert made >= COUNT * (MADE - 1)
    seen = see(servers)
    prefill, decode = seen.prefill, seen.decode
    assert prefill.servers == (f"{pair.prefill.url}/metrics",)
    assert decode.servers == (f"{pair.decode.url}/metrics",)
    assert decode.prompt_tokens == pytest.approx(sum(map(len, prompts)) / COUNT)
    assert decode.output_tokens == MADE
    assert decode.ttft.count == decode.tpot.count == COUNT
    # No client has more than one request under way.
    assert 0 < decode.batch <= CLIENTS * made / (COUNT * (MADE - 1))
    assert prefill.busy is not None
    assert 0 < prefill.busy[0] <= 1
    assert 0 <= decode.running[0] < 1
    found = advise(seen, Objectives(3600.0, 3600.0), 0.8)
    assert found is not None
    assert (found.prefill.there, found.decode.there) == (1, 1)
    assert found.prefill.load.instances == pytest.approx(prefill.busy[0] * (1 + found.growth))
