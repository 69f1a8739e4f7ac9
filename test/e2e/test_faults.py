"""Faults in the middle of transfers, under load: every request is answered or refused in words,
no other request changes a token, all pages return, both servers go on.

Each fault is caused HMA_SOAK times (default 1; `make repeat-faults` takes 50).
"""

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from .client import Greedy, assert_drained, greedy, output_ids, payload
from .conftest import Faults
from .harness import Pair, Server, until

pytestmark = [pytest.mark.e2e, pytest.mark.faults]

REPEATS = int(os.environ.get("HMA_SOAK", "1"))
STOP_S = 10 if REPEATS > 1 else 4
FLIPPED = 0.02  # of the writes; a range of eight is wrong three times running in 3 of 1,000
FIRST_WRITES = 40  # of the hundreds that the load needs
REQUEST_TIMEOUT_S = 900  # only to end a hang


@dataclass
class Faulty:
    """The pair, its faults, and what it answers when left alone."""

    pair: Pair
    faults: Faults
    jobs: list[tuple[list[int], int]]
    quiet: list[Greedy]

    def works(self) -> bool:
        """A router that saw ten failures in a row refuses everything for some seconds."""
        reply = requests.post(f"{self.pair.url}/generate", json=payload(*self.jobs[0]))
        if reply.status_code == 200:
            assert reply.json()["output_ids"] == self.quiet[0]
        return reply.status_code == 200

    def works_again(self) -> None:
        self.faults.set()
        until(self.works, self.pair.prefill, self.pair.decode)

    @contextlib.contextmanager
    def load_in_flight(self, rng: random.Random) -> "Iterator[Load]":
        """All jobs at once; some writes are done, others are kept from it until the end."""
        self.faults.set(hold_after=rng.randrange(FIRST_WRITES))
        load = Load(self)
        load.start()
        until(self.faults.held.exists, self.pair.prefill)
        yield load
        self.faults.set()


@pytest.fixture(scope="module")
def answers(pair: Pair) -> tuple[list[tuple[list[int], int]], list[Greedy]]:
    rng = random.Random(20261121)
    jobs = [
        ([rng.randrange(8, 4000) for _ in range(rng.choice([33, 64, 200, 700]))], 8)
        for _ in range(24)
    ]
    return jobs, [greedy(pair.url, *job) for job in jobs]


@pytest.fixture
def faulty(
    pair: Pair, faults: Faults, answers: tuple[list[tuple[list[int], int]], list[Greedy]]
) -> Iterator[Faulty]:
    """Works before each test and after it, whatever the test did."""
    made = Faulty(pair, faults, *answers)
    made.works_again()
    yield made
    faults.set()
    for server in (pair.prefill, pair.decode):
        if not server.alive():
            server.start()
            server.wait_healthy()
    made.works_again()


class Load(threading.Thread):
    """All jobs at once; `answers[i]` is a status and a body."""

    def __init__(self, faulty: Faulty) -> None:
        super().__init__(daemon=True)
        self.faulty = faulty
        self.answers: list[tuple[int, Any] | None] = [None] * len(faulty.jobs)
        self.threads = [
            threading.Thread(target=self._one, args=(i,)) for i in range(len(faulty.jobs))
        ]

    def _one(self, index: int) -> None:
        url, job = f"{self.faulty.pair.url}/generate", payload(*self.faulty.jobs[index])
        try:
            reply = requests.post(url, json=job, timeout=REQUEST_TIMEOUT_S)
            body = reply.json() if reply.status_code == 200 else reply.text
            self.answers[index] = reply.status_code, body
        except requests.RequestException as error:
            self.answers[index] = -1, repr(error)

    def run(self) -> None:
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join()

    def check(self, *, may_fail: bool) -> int:
        """Every request answered rightly, or refused with words if it may be. How many were."""
        self.join()
        refused = 0
        for answer, expected in zip(self.answers, self.faulty.quiet, strict=True):
            assert answer is not None
            status, body = answer
            if status == 200:
                reason = body["meta_info"]["finish_reason"]
                if reason["type"] == "abort" and may_fail:
                    assert reason["message"]
                    refused += 1
                    continue
                assert body["output_ids"] == expected
            else:
                assert may_fail and status >= 400 and body, (status, body)
                refused += 1
        return refused


def flipped_and_resent(pair: Pair) -> tuple[float, float]:
    return (
        pair.decode.metric("sglang_hma:kv_checksum_failures_total"),
        pair.prefill.metric("sglang_hma:kv_resent_ranges_total"),
    )


def test_flipped_bytes_are_sent_again(faulty: Faulty) -> None:
    before = flipped_and_resent(faulty.pair)
    for _ in range(REPEATS):
        faulty.faults.set(flip=FLIPPED)
        load = Load(faulty)
        load.start()
        refused = load.check(may_fail=True)
        print(f"flipped bytes: {refused} refused")
        assert refused < len(faulty.jobs) // 2
        faulty.works_again()
    after = flipped_and_resent(faulty.pair)
    assert after[0] > before[0] and after[1] > before[1]
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("flip", "arrived with wrong bytes 3 times"),
        ("flip_rows", "the first token arrived with wrong bytes"),
    ],
)
def test_hopeless_bytes_fail_in_words(faulty: Faulty, fault: str, words: str) -> None:
    faulty.faults.set(**{fault: 1.0})
    reply = requests.post(f"{faulty.pair.url}/generate", json=payload(*faulty.jobs[0]))
    assert words in reply.text, reply.text
    faulty.works_again()
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_stopped_server(faulty: Faulty, role: str, seed: int) -> None:
    """SIGSTOP of all its processes in the middle of transfers."""
    rng = random.Random(seed)
    server = getattr(faulty.pair, role)
    for _ in range(REPEATS):
        with faulty.load_in_flight(rng) as load:
            stopped = server.tree()
            for process in stopped:
                process.suspend()
        faulty.faults.set(slow_s=0.005)
        time.sleep(STOP_S)
        for process in stopped:
            process.resume()
        assert load.check(may_fail=False) == 0
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


def test_client_aborts_mid_prefill(faulty: Faulty, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(REPEATS):
        faulty.faults.set(slow_s=0.01)
        load = Load(faulty)
        load.start()
        for _ in range(6):
            prompt = [rng.randrange(8, 4000) for _ in range(1500)]
            url, patience = f"{faulty.pair.url}/generate", rng.uniform(0.05, 0.4)
            faulty.faults.set(hold_after=0)  # no answer may come first
            with pytest.raises(requests.RequestException):
                requests.post(url, json=payload(prompt, 4), timeout=patience)
            faulty.faults.set(slow_s=0.01)
        assert load.check(may_fail=False) == 0
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


def test_pages_are_not_reused_while_they_travel(faulty: Faulty, seed: int) -> None:
    """A prompt whose last page the cache has already computes that page again, and SGLang frees it
    at once: nobody may be given it before it has arrived."""
    rng = random.Random(seed)

    def prompts(count: int, pages: int) -> list[list[int]]:
        return [[rng.randrange(8, 4000) for _ in range(32 * pages)] for _ in range(count)]

    url, cached = faulty.pair.url, prompts(8, 2)
    alone = [greedy(url, prompt, 6) for prompt in cached]
    for _ in range(2 * REPEATS):
        for prompt in cached:
            output_ids(url, prompt, 1)
        faulty.faults.set(slow_s=0.03)
        others = prompts(8, 6)
        with ThreadPoolExecutor(16) as pool:
            asked = [pool.submit(output_ids, url, prompt, 6) for prompt in cached]
            for prompt in others:
                pool.submit(output_ids, url, prompt, 2)
            assert [answer.result() for answer in asked] == alone
        faulty.faults.set()
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_killed_server(faulty: Faulty, role: str, seed: int) -> None:
    """kill -9 of all its processes in the middle of transfers; at once a new one on its ports."""
    rng = random.Random(seed)
    server: Server = getattr(faulty.pair, role)
    other: Server = faulty.pair.decode if role == "prefill" else faulty.pair.prefill
    for _ in range(REPEATS):
        with faulty.load_in_flight(rng) as load:
            server.kill()
        faulty.faults.set(slow_s=0.05)
        server.start()
        refused = load.check(may_fail=True)
        print(f"{role} killed: {refused} refused")
        assert other.alive()
        server.wait_healthy()
        faulty.works_again()
        assert_drained(server, other)
