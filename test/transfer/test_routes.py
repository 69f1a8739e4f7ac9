"""Answers of bootstrap servers: what does not suit is refused in one line, whatever it is."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer.decode import route_asker, routes
from sglang_hma.transfer.decode.route_asker import Found, RouteAsker

GOOD = {
    **{"attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 32},
    **{"kv_cache_dtype": "auto", "follow_bootstrap_room": True, "kv_layout": "hma-kv/1"},
    **{"enable_dsa_cache_layer_split": False, "enable_kv_cache_sharding": False},
    **{"prefill_http_port": 30001, "decode_allocation_policy": "early", "target_tp_rank": None},
}


def refusal(answer: dict[str, Any], packs_kv: bool = True) -> str | None:
    try:
        route = routes.parse(answer)
    except ValueError as error:
        return str(error)
    return routes.unsuitable(
        route, page_size=32, kv_cache_dtype="auto", pp_size=1, packs_kv=packs_kv
    )


def test_an_answer_of_our_own_prefill_server_suits() -> None:
    assert refusal(GOOD) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_size": 16}, "page size mismatch: the prefill server has 16, the decode server 32"),
        ({"page_size": None}, "page size mismatch"),
        ({"page_size": "32"}, "`str`"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "KV cache dtype mismatch"),
        ({"kv_cache_dtype": None}, "KV cache dtype mismatch"),
        ({"attn_cp_size": 2}, "context-parallel (2)"),
        ({"attn_cp_size": 0}, ">= 1"),
        ({"pp_size": 2}, "pipeline-parallel (2)"),
        ({"pp_size": -1}, ">= 1"),
        ({"attn_tp_size": 0}, ">= 1"),
        ({"attn_tp_size": 1 << 40}, "<= 1024"),
        ({"attn_tp_size": "two"}, "`str`"),
        ({"dp_size": None}, "`null`"),
        ({"enable_kv_cache_sharding": True}, "splits its pages"),
        ({"kv_layout": "x" * 5000}, "length <= 1024"),
        ({"target_tp_ranks": [0, 1]}, "target_tp_ranks"),
        ({"more": 1}, "more"),
    ],
)
def test_what_does_not_suit_is_refused(change: dict[str, Any], words: str) -> None:
    reason = refusal(GOOD | change)
    assert reason is not None and words in reason and "\n" not in reason, reason


def test_native_pages_may_be_split_between_stages() -> None:
    assert refusal(GOOD | {"pp_size": 2, "attn_cp_size": 2}, packs_kv=False) is None


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*GOOD, "more"]), ANYTHING))
def test_nonsense_raises_nothing_else(change: dict[str, Any]) -> None:
    refusal(GOOD | change)


@given(st.dictionaries(st.sampled_from(["rank_ip", "rank_port", "pp_rank", "more"]), ANYTHING))
def test_nonsense_is_no_rank(info: dict[str, Any]) -> None:
    try:
        found = routes.parse_rank(info)
    except ValueError:
        return
    assert 0 < found.rank_port < 1 << 16 and found.rank_ip


@pytest.mark.parametrize("host", ["", "a b", "tcp://x", "10.0.0.1;eth0", "a\n", "x" * 300, None])
def test_odd_hosts_are_no_ranks(host: Any) -> None:
    with pytest.raises(ValueError, match="no address of a rank"):
        routes.parse_rank({"rank_ip": host, "rank_port": 1})


class Bootstrap(ThreadingHTTPServer):
    """Answers once it may, with a byte now and then before that."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("", 0), Handler)
        self.address = f"127.0.0.1:{self.server_port}"
        self.may, self.asked = threading.Event(), 0
        self.may.set()
        self.body = json.dumps(GOOD | {"attn_tp_size": 2}).encode()


class Handler(BaseHTTPRequestHandler):
    server: Bootstrap

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(200)
        self.end_headers()
        body = self.server.body
        if "target_tp_rank=-1" not in self.path:
            rank = self.path.split("target_tp_rank=")[1][0]
            body = json.dumps({"rank_ip": "10.0.0.1", "rank_port": 5000 + int(rank)}).encode()
        with contextlib.suppress(OSError):
            while not self.server.may.wait(0.02):
                self.wfile.write(b" ")
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def bootstrap() -> Iterator[Bootstrap]:
    server = Bootstrap()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.may.set()
    server.shutdown()


def look(asker: RouteAsker, address: str) -> Found:
    deadline = time.monotonic() + 600
    while (found := asker.look(address)) is None:
        assert time.monotonic() < deadline
    return found


def waiting_asker(bootstrap: Bootstrap) -> RouteAsker:
    """One that has asked a server which does not answer yet."""
    asker = RouteAsker()
    bootstrap.may.clear()
    assert asker.look(bootstrap.address) is None
    return asker


def test_a_server_and_its_ranks_are_asked_elsewhere(bootstrap: Bootstrap) -> None:
    asker = waiting_asker(bootstrap)
    bootstrap.may.set()
    found = look(asker, bootstrap.address)
    assert routes.parse(found.answer.route).attn_tp_size == 2
    ports = {place: routes.parse_rank(rank).rank_port for place, rank in found.ranks.items()}
    assert ports == {(0, 0, 0, 0): 5000, (0, 0, 1, 0): 5001}
    asked = bootstrap.asked
    look(asker, bootstrap.address)
    assert bootstrap.asked == 2 * asked, "an answer is given once"


def test_silent_servers_hold_up_the_scheduler_once(
    bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "TIMEOUT_S", 1e6)
    asker = waiting_asker(bootstrap)
    monkeypatch.setattr(route_asker, "PATIENCE_S", 1e6)  # another wait would not end
    for address in (bootstrap.address, bootstrap.address.replace("127.0.0.1", "localhost")) * 3:
        assert asker.look(address) is None
    bootstrap.may.set()


def test_an_answer_that_nobody_fetched_is_no_news(
    bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = waiting_asker(bootstrap)
    bootstrap.may.set()
    first = asker._asked[bootstrap.address].future.result(600)
    monkeypatch.setattr(route_asker, "FRESH_S", -1.0)
    asker.look(bootstrap.address)
    monkeypatch.undo()
    assert look(asker, bootstrap.address) is not first


def test_an_answer_has_an_end(bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "TIMEOUT_S", 0.3)
    bootstrap.may.clear()
    assert routes.fetch(bootstrap.address) is None
    monkeypatch.undo()
    bootstrap.may.set()
    assert routes.fetch(bootstrap.address) is not None
    for body in (b" " * (routes.MAX_BYTES + 1) + b"{}", b"[]", b"{", b"\xff", b"null"):
        bootstrap.body = body
        assert routes.fetch(bootstrap.address) is None
        assert RouteAsker().look(bootstrap.address) is None


def test_only_so_many_are_asked_at_a_time(
    bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route_asker, "MAX_ASKED", 2)
    asker = RouteAsker()
    bootstrap.may.clear()
    names = [f"{host}:{bootstrap.server_port}" for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3")]
    asked = [asker.look(name) for name in names]
    assert asked == [None] * 3 and len(asker._asked) == 2
    bootstrap.may.set()
    look(asker, names[0])
    assert look(asker, names[2]).answer.route
