"""Faults in the middle of transfers from two pools to two: every request is answered rightly or
refused in words, and all pages of all pools return."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from benchmark.models.families import WINDOW

from .client import assert_drained, greedy, payload
from .conftest import CHUNK, FAULTY_LINK, Faults
from .harness import Server, running_pair, until
from .test_faults import FLIPPED, Faulty, Load, flipped_and_resent
from .test_two_pool_pair import FLAGS, RATIOS, made_model
from .test_two_pools import STRICT, prompt, used

pytestmark = [pytest.mark.e2e, pytest.mark.faults]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[Faulty]:
    """Prompts shorter than a window, longer, of whole pages and not, in one chunk and in several.
    Decode has room for some of them at a time."""
    folder, _ = made_model(tmp_path_factory)
    faults = Faults(logs / "faults-two-pools.json")
    faults.set()
    rng = random.Random(20261128)
    jobs = [
        (prompt(rng, rng.choice((WINDOW - 15, WINDOW, 2 * CHUNK, 200, 333, 500))), 60)
        for _ in range(20)
    ]
    with running_pair(
        folder,
        logs,
        *FLAGS,
        prefill_flags=RATIOS["prefill"],
        decode_flags=(*RATIOS["decode"], "--num-reserved-decode-tokens", "1"),
        name="two-pools-faulty",
        env=STRICT | {"PYTHONPATH": str(FAULTY_LINK), "HMA_TEST_FAULTS": str(faults.file)},
    ) as pair:
        yield Faulty(pair, faults, jobs, [greedy(pair.url, *job) for job in jobs])


@pytest.fixture
def faulty(made: Faulty) -> Iterator[Faulty]:
    """Works before each test and after it, and then keeps no page."""
    made.works_again()
    yield made
    servers = made.pair.prefill, made.pair.decode
    for server in servers:
        if not server.alive():
            server.start()
            server.wait_healthy()
    made.works_again()
    assert_drained(*servers)
    for server in servers:
        until(lambda server=server: not any(used(server).values()), server)


def test_flipped_bytes_are_sent_again(faulty: Faulty) -> None:
    before = flipped_and_resent(faulty.pair)
    faulty.faults.set(flip=FLIPPED)
    load = Load(faulty)
    load.start()
    assert load.check(may_fail=True) < len(faulty.jobs) // 2
    after = flipped_and_resent(faulty.pair)
    assert after[0] > before[0] and after[1] > before[1]


def test_hopeless_bytes_fail_in_words(faulty: Faulty) -> None:
    faulty.faults.set(flip=1.0)
    reply = requests.post(f"{faulty.pair.url}/generate", json=payload(*faulty.jobs[0]))
    assert "arrived with wrong bytes 3 times" in reply.text, reply.text


def test_clients_that_leave(faulty: Faulty, seed: int) -> None:
    """In the middle of prefill, and of a transfer."""
    rng = random.Random(seed)
    faulty.faults.set(slow_s=0.01)
    load = Load(faulty)
    load.start()
    for _ in range(6):
        url, patience = f"{faulty.pair.url}/generate", rng.uniform(0.05, 0.4)
        faulty.faults.set(hold_after=0)  # no answer may come first
        with pytest.raises(requests.RequestException):
            requests.post(url, json=payload(prompt(rng, 1500), 4), timeout=patience)
        faulty.faults.set(slow_s=0.01)
    assert load.check(may_fail=False) == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_killed_server(faulty: Faulty, role: str, seed: int) -> None:
    """kill -9 of all its processes in the middle of transfers; at once a new one on its ports."""
    server: Server = getattr(faulty.pair, role)
    with faulty.load_in_flight(random.Random(seed)) as load:
        for process in server.tree():
            process.send_signal(signal.SIGKILL)
        server.popen.wait()
    faulty.faults.set(slow_s=0.05)
    server.start()
    print(f"{role} killed: {load.check(may_fail=True)} refused")
    server.wait_healthy()
