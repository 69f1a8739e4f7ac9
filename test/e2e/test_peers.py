"""Who reaches a decode server's port, and a prefill server that is another one than before: neither
ends a server, gets what belongs to others, or leaves anybody waiting."""

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_hma.transfer.decode import routes

from .client import Greedy, assert_drained, greedy, output_ids, payload
from .conftest import COMMON, FAULTY_LINK, POOL_TOKENS, Faults
from .harness import Pair, Server, launch, launch_router, running, until

pytestmark = pytest.mark.e2e

PROMPT = list(range(10, 80))
PATIENCE_S = 60  # a request that waits for nobody waits for minutes
# SGLang notices a prefill server that is away for some heartbeats. This one is back too soon.
NEVER_AWAY = {
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
    "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "1000000",
}


class Liar(ThreadingHTTPServer):
    """A bootstrap server that says what a test wants: `answer` of itself, `rank` of its ranks."""

    daemon_threads = True
    answer: Any = None
    rank: Any = None
    slow: threading.Event | None = None  # a byte a second, until it is set

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), LiarHandler)
        self.asked_slowly = 0


class LiarHandler(BaseHTTPRequestHandler):
    server: Liar

    def do_GET(self) -> None:
        self.server.asked_slowly += self.server.slow is not None
        whole = "target_tp_rank=-1" in self.path
        body = self.server.answer if whole else self.server.rank
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        if self.server.slow is None:
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        with contextlib.suppress(OSError):
            while self.server.slow is not None and not self.server.slow.wait(1):
                self.wfile.write(b" ")
            self.wfile.write(raw)

    def log_message(self, *_: Any) -> None: ...


@dataclass
class Attacked:
    pair: Pair
    liar: Liar
    quiet: Greedy

    def straight(self, to: Server | None = None, **fields: Any) -> requests.Response:
        """A request that goes to a server itself, to decode if not said."""
        good = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.pair.prefill.bootstrap_port}
        body = payload(PROMPT, 4) | good | {"bootstrap_room": 5} | fields
        url = (to or self.pair.decode).url
        return requests.post(f"{url}/generate", json=body, timeout=PATIENCE_S)

    def unharmed(self) -> None:
        assert output_ids(self.pair.url, PROMPT) == self.quiet


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    server = Liar()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def started(model: Path, logs: Path, liar: Liar, faults: Faults) -> Iterator[Pair]:
    env = NEVER_AWAY | {"PYTHONPATH": str(FAULTY_LINK), "HMA_TEST_FAULTS": str(faults.file)}
    flags = (*COMMON, "--max-total-tokens", str(POOL_TOKENS))
    prefill = launch("peers-prefill", model, logs, *flags, mode="prefill", env=env)
    allowed = [f"localhost:{prefill.bootstrap_port}", f"127.0.0.1:{prefill.bootstrap_port}"]
    allowed.append(f"127.0.0.1:{liar.server_port}")
    peers = ("--hma-prefill-peers", *allowed)
    decode = launch("peers-decode", model, logs, *flags, *peers, mode="decode", env=env)
    with running(prefill, decode):
        router = launch_router(logs, prefill, decode, "peers-router")
        with running(router):
            yield Pair(prefill, decode, router)


@pytest.fixture
def attacked(started: Pair, liar: Liar, faults: Faults) -> Iterator[Attacked]:
    faults.set()
    made = Attacked(started, liar, greedy(started.url, PROMPT))
    yield made
    faults.set()
    assert started.prefill.alive() and started.decode.alive()
    made.unharmed()
    assert_drained(started.prefill, started.decode)


@pytest.mark.parametrize(
    "fields",
    [
        {"bootstrap_host": None},
        {"bootstrap_room": None},
        {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1},
        {"bootstrap_host": "169.254.169.254", "bootstrap_port": 80},
        {"bootstrap_host": "127.0.0.1:8998/x?y="},
        {"bootstrap_host": "2.2.2.2"},
        {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0},
        {"bootstrap_host": ["127.0.0.1"]},
        {"bootstrap_host": [None]},
        {"bootstrap_room": [5]},
        {"bootstrap_room": []},
        {"bootstrap_room": -5},
        {"bootstrap_room": 0},
        {"bootstrap_room": 1 << 63},
        {"bootstrap_room": 1 << 64},
        {"bootstrap_room": 1 << 300},
        {"bootstrap_room": "room"},
        {"bootstrap_port": 0},
        {"bootstrap_port": 1 << 20},
        {"input_ids": [PROMPT, PROMPT], "bootstrap_room": [5]},
        {"input_ids": [PROMPT, PROMPT], "bootstrap_room": [5, 5]},
        {"input_ids": [PROMPT, PROMPT], "bootstrap_room": [5, 6, 7]},
        {"input_ids": [PROMPT, PROMPT], "bootstrap_host": ["127.0.0.1", "2.2.2.2"]},
        {"rid": "HEALTH_CHECK_x", "bootstrap_host": "2.2.2.2", "bootstrap_room": 0},
    ],
)
def test_what_a_client_may_not_ask_of_decode(attacked: Attacked, fields: dict[str, Any]) -> None:
    answer = attacked.straight(**fields)
    assert answer.status_code == 400, (answer.status_code, answer.text[:300])
    assert len(answer.text.splitlines()) == 1, answer.text


@pytest.mark.parametrize(
    "fields",
    [
        *({"bootstrap_room": room} for room in ([5], [], -5, 0, 1 << 63, None)),
        *({"bootstrap_host": host} for host in ("2.2.2.2", ["127.0.0.1"], None)),
        {"input_ids": [PROMPT, PROMPT], "bootstrap_room": [5, 5]},
    ],
)
def test_what_a_client_may_not_ask_of_prefill(attacked: Attacked, fields: dict[str, Any]) -> None:
    answer = attacked.straight(attacked.pair.prefill, **fields)
    assert answer.status_code == 400, (answer.status_code, answer.text[:300])


def test_other_ways_to_ask_for_pages_that_nobody_fills(attacked: Attacked) -> None:
    url, fake = attacked.pair.decode.url, {"bootstrap_host": "2.2.2.2", "bootstrap_room": 3}
    completion = {"model": "default", "prompt": "Hello", "max_tokens": 4} | fake
    assert requests.post(f"{url}/v1/completions", json=completion).status_code == 400
    body = payload(PROMPT, 4) | fake
    host = {"Host": f"127.0.0.1/health?x={'y' * 8}"}
    assert requests.post(f"{url}/generate", json=body, headers=host).status_code == 400
    with requests.post(f"{url}/generate", json=body | {"stream": True}, stream=True) as reply:
        said = reply.text
    assert "own health checks" in said and "output_ids" not in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_size": 16}, "page size mismatch"),
        ({"page_size": "x"}, "does not answer as SGLang's"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "dtype mismatch"),
        ({"attn_cp_size": 2}, "context-parallel"),
        ({"pp_size": 2}, "pipeline-parallel"),
        ({"attn_tp_size": 0}, "does not answer as SGLang's"),
        ({"attn_tp_size": 3}, "TP"),
        ({"attn_tp_size": "two"}, "TP|SGLang's"),
        ({"kv_layout": None}, "KV format mismatch"),
        ({"kv_layout": "hma-kv/9"}, "KV format mismatch"),
        ({"dsv41_spec_layout": {"x": 1}}, "speculates"),
        ({"decode_allocation_policy": 3}, "does not answer as SGLang's"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_bootstrap_server_that_does_not_suit(
    attacked: Attacked, change: dict[str, Any], words: str
) -> None:
    answer = routes.fetch(f"127.0.0.1:{attacked.pair.prefill.bootstrap_port}")
    assert answer is not None
    attacked.liar.answer = answer.route | change
    reply = attacked.straight(bootstrap_port=attacked.liar.server_port)
    assert reply.status_code == 400, (reply.status_code, reply.text[:300])
    assert any(word in reply.text for word in words.split("|")), reply.text


@pytest.mark.parametrize(
    "rank",
    [
        {"rank_ip": "no host", "rank_port": 1},
        {"rank_ip": "127.0.0.1", "rank_port": "x"},
        {"rank_ip": "127.0.0.1", "rank_port": 1 << 40},
        {"rank_ip": None, "rank_port": 5},
        {},
        [],
        b"\xff",
    ],
)
def test_a_rank_at_no_address(attacked: Attacked, rank: Any) -> None:
    answer = routes.fetch(f"127.0.0.1:{attacked.pair.prefill.bootstrap_port}")
    assert answer is not None
    attacked.liar.answer, attacked.liar.rank = answer.route, rank
    reply = attacked.straight(bootstrap_port=attacked.liar.server_port)
    assert reply.status_code >= 400, reply.text
    if isinstance(rank, dict):
        assert reply.status_code == 400 and "no address of a rank" in reply.text, reply.text


def test_a_bootstrap_server_that_answers_a_byte_a_second(attacked: Attacked) -> None:
    """Others do not wait for it: it is not asked in the thread that generates."""
    attacked.liar.slow = threading.Event()
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(attacked.straight, bootstrap_port=attacked.liar.server_port)
            until(lambda: attacked.liar.asked_slowly, attacked.pair.decode)
            attacked.unharmed()
            attacked.liar.answer = {}
            attacked.liar.slow.set()
            assert waiting.result().status_code >= 400
    finally:
        attacked.liar.slow = None


def test_nobody_registers_as_this_prefill_server(attacked: Attacked) -> None:
    bootstrap = f"http://127.0.0.1:{attacked.pair.prefill.bootstrap_port}"
    query = {f"target_{kind}_rank": 0 for kind in ("tp", "pp")}
    query |= {f"prefill_{kind}_rank": 0 for kind in ("dp", "cp")}
    before = requests.get(f"{bootstrap}/route", params=query).json()
    row = {f"attn_{kind}_{what}": int(what == "size") for kind in ("tp", "cp", "dp")
           for what in ("size", "rank")}  # fmt: skip
    row |= {"pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0}
    row |= {"rank_ip": "127.0.0.1", "rank_port": 6666, "page_size": 32, "kv_cache_dtype": "auto"}
    assert requests.put(f"{bootstrap}/route", json=row).status_code == 403
    assert requests.get(f"{bootstrap}/route", params=query).json() == before


def test_a_prefill_server_restarted_between_two_heartbeats(
    attacked: Attacked, faults: Faults
) -> None:
    """On the same ports, by kill -9. What waited for the old one fails in words, or the router asks
    again, and the next request is answered."""
    prefill, decode, url = attacked.pair.prefill, attacked.pair.decode, attacked.pair.url
    faults.set(hold_after=0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(requests.post, f"{url}/generate", json=payload(PROMPT, 4))
        until(faults.held.exists, prefill)
        prefill.kill()
        faults.set()
        prefill.start()
        prefill.wait_healthy()
        decode.wait_logged("was restarted")
        answer = waiting.result()
        assert answer.text
        if answer.status_code == 200:
            assert answer.json()["output_ids"] == attacked.quiet.tokens[:4]

    def answered() -> bool:
        with contextlib.suppress(requests.Timeout):
            body = payload(PROMPT)
            reply = requests.post(f"{url}/generate", json=body, timeout=PATIENCE_S)
            return reply.status_code == 200 and reply.json()["output_ids"] == attacked.quiet
        raise AssertionError("a request waits for ports that are gone")

    until(answered, prefill, decode)  # the router lets requests through again after some seconds
