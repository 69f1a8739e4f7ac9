"""A stopped decode server costs the others the pages of its own requests, and nothing else."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from .client import WITH_MARGINS, Greedy, assert_drained, flush, load, payload
from .conftest import COMMON, PREFILL_TOKENS, Faults
from .harness import Pair, Server, launch, running, until

pytestmark = [pytest.mark.e2e, pytest.mark.faults]

PAGE = 32
POOL_PAGES = PREFILL_TOKENS // PAGE
GUESTS, GUEST_PAGES = 8, 2
AT_ONCE = 6
LEASE_S = 3600.0  # in place of 30 s: whether a machine is slow must not matter


@pytest.fixture(scope="module")
def guest(pair: Pair, model: Path, logs: Path) -> Iterator[Server]:
    """A second decode server of the same prefill server."""
    pool = ("--max-total-tokens", "4096", "--num-reserved-decode-tokens", "1")
    server = launch("guest", model, logs, *COMMON, *pool, mode="decode")
    with running(server):
        yield server


def ask(prefill: Server, decode: Server, prompt: list[int], **extra: Any) -> dict[str, Any]:
    """Four new tokens: as a router does, each server gets its half of a request."""
    half = {"bootstrap_host": "127.0.0.1", "bootstrap_port": prefill.bootstrap_port}
    job = payload(prompt, 4, **half, bootstrap_room=random.getrandbits(62), **extra)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(requests.post, f"{prefill.url}/generate", json=job)
        reply = requests.post(f"{decode.url}/generate", json=job)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def in_flight(prefill: Server) -> int:
    """Requests that are computed and not yet concluded."""
    return int(load(prefill)["disaggregation"]["prefill_inflight_queue_reqs"])


def test_others_go_on_while_a_peer_is_stopped(
    pair: Pair, guest: Server, faults: Faults, seed: int
) -> None:
    rng = random.Random(seed)

    def prompt(tokens: int) -> list[int]:
        return [rng.randrange(8, 4000) for _ in range(tokens)]

    # A prompt of whole pages, asked twice, frees a page while it is on its way.
    guests = [prompt(GUEST_PAGES * PAGE) for _ in range(GUESTS)]
    others = [prompt(tokens) for tokens in (96, 130, 256, 300, 448, 500) * 2]
    left = POOL_PAGES - GUESTS * (GUEST_PAGES + 1)
    assert sum(map(len, others)) / len(others) * AT_ONCE > left * PAGE

    def ask_others(**extra: Any) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda one: ask(pair.prefill, pair.decode, one, **extra), others))

    quiet = [Greedy.of(reply) for reply in ask_others(**WITH_MARGINS)]
    flush(pair.prefill)
    expected = [Greedy.of(ask(pair.prefill, pair.decode, one, **WITH_MARGINS)) for one in guests]
    faults.set(hold_after=0)
    with ThreadPoolExecutor(GUESTS) as pool:
        asked = [pool.submit(ask, pair.prefill, guest, one) for one in guests]
        until(
            lambda: in_flight(pair.prefill) >= GUESTS and faults.hold_a_peer(), pair.prefill, guest
        )
        stopped = guest.tree()
        for process in stopped:
            process.suspend()
        try:
            faults.set(hold_peers=True, lease_s=LEASE_S)
            assert [reply["output_ids"] for reply in ask_others()] == quiet
            # Decode's last word about a request reaches prefill after the client has its answer.
            until(lambda: in_flight(pair.prefill) == GUESTS, pair.prefill)
            # What an alert is made of.
            until(lambda: pair.prefill.metric("sglang_hma:kv_stuck_peers") == 1, pair.prefill)
            assert pair.prefill.metric("sglang_hma:kv_oldest_write_seconds") > 9
        finally:
            for process in stopped:
                process.resume()
            faults.set()
        assert [one.result()["output_ids"] for one in asked] == expected
    assert_drained(pair.prefill, pair.decode, guest)
    until(lambda: pair.prefill.metric("sglang_hma:kv_stuck_peers") == 0, pair.prefill)
