"""Faults in the middle of transfers from two pools to two: every request is answered rightly or
refused in words, and all pages of all pools return."""

import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from benchmark.models.families import WINDOW
from hma_kernels import PAGE

from .client import assert_drained, greedy, output_ids, payload
from .conftest import CHUNK, FAULTY_LINK, Faults
from .harness import Server, launch, launch_router, running, running_pair, until
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


def test_one_pool_and_two_refuse_each_other(made: Faulty, logs: Path) -> None:
    """In words that the client sees, and both servers go on."""
    one_pool = ("--disable-hybrid-swa-memory", *FLAGS)
    model, prefill = Path(made.pair.prefill.info()["model_path"]), made.pair.prefill
    decode = launch("two-pools-one-pool", model, logs, *one_pool, mode="decode")
    with running(decode):
        router = launch_router(logs, prefill, decode, "two-pools-one-pool-router")
        with running(router):
            reply = requests.post(f"{router.url}/generate", json=payload(*made.jobs[0]))
        assert reply.status_code == 400, reply.text
        assert "window: 0/47; windowed: 0/1" in reply.text, reply.text
        assert "--disable-hybrid-swa-memory on both or on none" in reply.text, reply.text
        decode.check_alive()
    made.works_again()


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


def test_pages_are_not_reused_while_they_travel(faulty: Faulty, seed: int) -> None:
    """Prompts whose last pages prefill's cache has already, in one pool or in both: the others'
    windows have pushed some out of the smaller one."""
    rng, url = random.Random(seed), faulty.pair.url
    cached = [prompt(rng, PAGE * rng.randrange(2, 6)) for _ in range(8)]
    alone = [greedy(url, each, 6) for each in cached]
    for _ in range(3):
        for each in cached:
            output_ids(url, each, 1)
        others = [prompt(rng, 6 * PAGE) for _ in range(8)]
        faulty.faults.set(slow_s=0.03)
        with ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(output_ids, url, each, 6) for each in (*cached, *cached)]
            for each in others:
                pool.submit(output_ids, url, each, 2)
            assert [answer.result() for answer in asked] == alone + alone
        faulty.faults.set()


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
