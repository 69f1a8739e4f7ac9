"""Faults in the middle of transfers, under load: every request is answered or refused in words,
no other request changes a token, all pages return, both servers go on.

Each fault is caused HMA_SOAK times (default 1; `make soak` takes 50).
"""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from .conftest import COMMON
from .harness import Pair, Server, output_ids, payload, running_pair
from .test_load import assert_drained

pytestmark = pytest.mark.e2e

REPEATS = int(os.environ.get("HMA_SOAK", "1"))
STOP_S = 10 if REPEATS > 1 else 4
FLIPPED = 0.02  # of the writes; a range of eight is wrong three times running in 3 of 1,000
FAULTY_LINK = Path(__file__).parent.parent / "stand_ins" / "faulty_link"
REQUEST_TIMEOUT_S = 120


@dataclass
class Faulty:
    pair: Pair
    file: Path
    jobs: list[tuple[list[int], int]]
    quiet: list[list[int]]

    def set(self, **faults: float) -> None:
        self.file.write_text(json.dumps(faults))


@pytest.fixture(scope="module")
def faulty(model: Path, logs: Path) -> Iterator[Faulty]:
    """A pair whose transfer engine takes orders, and what it answers when left alone.

    Prefill's pool is small, so that freed pages are handed out again at once.
    """
    file = logs / "faults.json"
    file.write_text("{}")
    env = {"PYTHONPATH": str(FAULTY_LINK), "HMA_TEST_FAULTS": str(file)}
    pools = {
        "prefill_flags": ("--max-total-tokens", "2048"),
        "decode_flags": ("--max-total-tokens", "16384"),
    }
    with running_pair(model, logs, *COMMON, **pools, name="faulty", env=env) as pair:
        rng = random.Random(20261121)
        jobs = [
            ([rng.randrange(8, 4000) for _ in range(rng.choice([33, 64, 200, 700]))], 8)
            for _ in range(24)
        ]
        yield Faulty(pair, file, jobs, [output_ids(pair.url, *job) for job in jobs])


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
        prompt, tokens = self.faulty.jobs[index]
        url = f"{self.faulty.pair.url}/generate"
        try:
            reply = requests.post(url, json=payload(prompt, tokens), timeout=REQUEST_TIMEOUT_S)
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
        self.join(REQUEST_TIMEOUT_S + 30)
        assert not self.is_alive(), "requests are still waiting"
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


def metric(server: Server, name: str) -> float:
    return sum(server.metrics(f"sglang_hma:kv_{name}").values())


def tree(server: Server) -> list[psutil.Process]:
    root = psutil.Process(server.popen.pid)
    return [root, *root.children(recursive=True)]


def works_again(faulty: Faulty, seconds: float = 60) -> None:
    """New requests give the quiet run's tokens, within a time to recover."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            assert output_ids(faulty.pair.url, *faulty.jobs[0]) == faulty.quiet[0]
            return
        except (AssertionError, requests.RequestException):
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def test_flipped_bytes_are_sent_again(faulty: Faulty) -> None:
    before = metric(faulty.pair.decode, "checksum_failures_total")
    for _ in range(REPEATS):
        faulty.set(flip=FLIPPED)
        load = Load(faulty)
        load.start()
        refused = load.check(may_fail=True)
        print(f"flipped bytes: {refused} refused")
        assert refused < len(faulty.jobs) // 2
        # After ten failures in a row the router refuses everything for some seconds.
        faulty.set()
        works_again(faulty)
    assert metric(faulty.pair.decode, "checksum_failures_total") > before
    assert metric(faulty.pair.prefill, "resent_ranges_total") > 0
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


def test_hopeless_bytes_fail_in_words(faulty: Faulty) -> None:
    faulty.set(flip=1.0)
    reply = requests.post(
        f"{faulty.pair.url}/generate", json=payload(*faulty.jobs[0]), timeout=REQUEST_TIMEOUT_S
    )
    assert "arrived with wrong bytes 3 times" in reply.text, reply.text
    faulty.set()
    works_again(faulty)
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_stopped_server(faulty: Faulty, role: str) -> None:
    """SIGSTOP of all its processes in the middle of transfers."""
    server = getattr(faulty.pair, role)
    for _ in range(REPEATS):
        faulty.set(slow_s=0.005)
        load = Load(faulty)
        load.start()
        time.sleep(0.7)
        stopped = tree(server)
        for process in stopped:
            process.suspend()
        time.sleep(STOP_S)
        for process in stopped:
            process.resume()
        assert load.check(may_fail=False) == 0
    faulty.set()
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


def test_client_aborts_mid_prefill(faulty: Faulty) -> None:
    rng = random.Random(1)
    for _ in range(REPEATS):
        faulty.set(slow_s=0.01)
        load = Load(faulty)
        load.start()
        for _ in range(6):
            prompt = [rng.randrange(8, 4000) for _ in range(1500)]
            url, patience = f"{faulty.pair.url}/generate", rng.uniform(0.05, 0.4)
            with pytest.raises(requests.RequestException):
                requests.post(url, json=payload(prompt, 4), timeout=patience)
        assert load.check(may_fail=False) == 0
    faulty.set()
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


def test_pages_are_not_reused_while_they_travel(faulty: Faulty) -> None:
    """A prompt whose last page the cache has already computes that page again, and SGLang frees it
    at once: nobody may be given it before it has arrived."""
    rng = random.Random(2)

    def prompts(count: int, pages: int) -> list[list[int]]:
        return [[rng.randrange(8, 4000) for _ in range(32 * pages)] for _ in range(count)]

    url, cached = faulty.pair.url, prompts(8, 2)
    alone = [output_ids(url, prompt, 6) for prompt in cached]
    for _ in range(2 * REPEATS):
        for prompt in cached:
            output_ids(url, prompt, 1)
        faulty.set(slow_s=0.03)
        others = prompts(8, 6)
        with ThreadPoolExecutor(16) as pool:
            asked = [pool.submit(output_ids, url, prompt, 6) for prompt in cached]
            for prompt in others:
                pool.submit(output_ids, url, prompt, 2)
            assert [answer.result() for answer in asked] == alone
        faulty.set()
    faulty.set()
    assert_drained(faulty.pair.prefill, faulty.pair.decode)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_killed_server(faulty: Faulty, role: str) -> None:
    """kill -9 of all its processes in the middle of transfers; at once a new one on its ports."""
    server: Server = getattr(faulty.pair, role)
    other: Server = faulty.pair.decode if role == "prefill" else faulty.pair.prefill
    for _ in range(REPEATS):
        faulty.set(slow_s=0.05)
        load = Load(faulty)
        load.start()
        time.sleep(0.7)
        for process in tree(server):
            process.send_signal(signal.SIGKILL)
        server.popen.wait(10)
        began = time.monotonic()
        server.start()
        refused = load.check(may_fail=True)
        print(f"{role} killed: {refused} refused after {time.monotonic() - began:.1f} s")
        assert other.alive()
        faulty.set()
        server.wait_healthy()
        works_again(faulty)
        assert_drained(server, other)
