"""Decode's pool is full of prompts that are on their way when the few that run need more of it."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from .client import assert_drained, generate, greedy, load, output_ids, payload
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


@pytest.mark.parametrize("tokens", [4, SHORT_PROMPT])
def test_a_room_that_another_has_is_refused_and_the_other_served(
    pair: Pair, faults: Faults, seed: int, tokens: int
) -> None:
    """While the pages of the first are on their way."""
    rng = random.Random(seed)
    first, second = ([rng.randrange(8, 4000) for _ in range(n)] for n in (SHORT_PROMPT, tokens))
    here = {"bootstrap_host": "127.0.0.1", "bootstrap_port": pair.prefill.bootstrap_port}
    room = here | {"bootstrap_room": rng.randrange(1, 2**62)}
    quiet = greedy(pair.url, first)
    faults.set(hold_after=0)
    with ThreadPoolExecutor(2) as pool:
        halves = [
            pool.submit(generate, each.url, first, **room) for each in (pair.prefill, pair.decode)
        ]
        until(faults.held.exists, pair.prefill, pair.decode)
        for server in (pair.prefill, pair.decode):
            reply = requests.post(f"{server.url}/generate", json=payload(second, 4, **room))
            assert reply.status_code == 500 and "belongs to another request" in reply.text
            server.check_alive()
        faults.set()
        assert quiet == halves[1].result()["output_ids"]
        halves[0].result()
    assert_drained(pair.prefill, pair.decode)
