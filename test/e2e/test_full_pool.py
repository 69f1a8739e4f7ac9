"""Decode's pool is full of prompts that are on their way when the few that run need more of it."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from .client import assert_drained, generate, greedy, load, output_ids, payload
from .conftest import POOL_TOKENS, PREFILL_TOKENS, Faults
from .harness import Pair, Server, until

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


@pytest.mark.parametrize("name", ["single", "prefill"])
def test_what_a_server_does_not_refuse_it_serves(
    launched: dict[str, Server], pair: Pair, single: Server, seed: int, name: str
) -> None:
    """A prompt as long as its pool allows; a token more is refused at once."""
    server, rng = launched[name], random.Random(seed)
    url = pair.url if name == "prefill" else single.url
    refused_from = server.info()["max_req_input_len"]
    prompt = [rng.randrange(8, 4000) for _ in range(refused_from)]
    assert len(output_ids(url, prompt[1:], 4)) == 4
    rooms = {"bootstrap_host": "127.0.0.1", "bootstrap_room": rng.getrandbits(63)}
    asked = payload(prompt, 4) | (rooms if name == "prefill" else {})
    reply = requests.post(f"{server.url}/generate", json=asked)
    assert reply.status_code == 400 and str(refused_from) in reply.text, reply.text
    if name == "prefill":  # decode, whose pool is larger, is told
        reply = requests.post(f"{pair.url}/generate", json=payload(prompt, 4))
        assert reply.status_code == 400 and str(refused_from) in reply.text, reply.text
        assert "the prefill server refuses it" in reply.text
    assert_drained(server)


def test_a_cached_prompt_is_computed_again_for_its_logprobs(pair: Pair, seed: int) -> None:
    """Of more than half of prefill's pool: it has no room for both copies."""
    rng = random.Random(seed)
    prompt = [rng.randrange(8, 4000) for _ in range(PREFILL_TOKENS * 3 // 4)]
    answers = [
        generate(pair.url, prompt, 4, return_logprob=True, logprob_start_len=start)
        for start in (-1, 0, 0, 700)
    ]
    assert len({tuple(each["output_ids"]) for each in answers}) == 1
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
