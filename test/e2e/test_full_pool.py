"""Decode's pool is full of prompts that are on their way when the few that run need more of it."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from .client import assert_drained, greedy, load, output_ids
from .conftest import POOL_TOKENS, Faults
from .harness import Pair, until

pytestmark = [pytest.mark.e2e, pytest.mark.faults]

LONG, LONG_PROMPT, LONG_TOKENS = 2, 40, 400
SHORT, SHORT_PROMPT = 34, 130


def test_the_last_running_request_waits_for_those_that_land(
    pair: Pair, faults: Faults, seed: int
) -> None:
    rng = random.Random(seed)

    def prompt(tokens: int) -> list[int]:
        return [rng.randrange(8, 4000) for _ in range(tokens)]

    long = [(prompt(LONG_PROMPT), LONG_TOKENS) for _ in range(LONG)]
    short = [(prompt(SHORT_PROMPT), 4) for _ in range(SHORT)]
    assert SHORT * SHORT_PROMPT > POOL_TOKENS > LONG_TOKENS + LONG_PROMPT

    def ask(job: tuple[list[int], int]) -> list[int]:
        return output_ids(pair.url, *job)

    def queued(name: str) -> int:
        return int(load(pair.decode)["disaggregation"][f"decode_{name}_queue_reqs"])

    def running() -> int:
        return int(load(pair.decode)["num_running_reqs"])

    alive = (pair.prefill, pair.decode, pair.router)
    quiet = [greedy(pair.url, *job) for job in long + short]
    faults.set(hold_after=0)
    with ThreadPoolExecutor(LONG + SHORT) as pool:
        asked = [pool.submit(ask, job) for job in long]
        until(lambda: queued("transfer") == LONG, *alive)
        asked += [pool.submit(ask, job) for job in short]
        until(lambda: queued("prealloc") > 0 and queued("transfer") > LONG + 8, *alive)
        # Write by write, until a long one has landed.
        while not running():
            faults.set(hold_after=1)
            until(faults.held.exists, *alive)
        until(lambda: (queued("retracted") > 0 and not running()) or asked[0].done(), *alive)
        faults.set()
        assert [answer.result() for answer in asked] == quiet
    assert_drained(pair.prefill, pair.decode)
