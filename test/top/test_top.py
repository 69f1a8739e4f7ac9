"""What top shows of servers whose load is known, of those that say nothing, and of liars."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client import Counter, Gauge, Histogram
from rich.console import Console

from sglang_hma.top.__main__ import main
from sglang_hma.top.reading import Reading, reading
from sglang_hma.top.screen import reasons, table
from sglang_hma.top.servers import base_url
from sglang_hma.top.watch import Row, Silent, Watch

from ..planner.live_fleet import Exporter, answering

Answer = Callable[[str], tuple[int, bytes]]


class Server(Exporter):
    """With what sglang-hma adds."""

    def restart(self) -> None:
        super().restart()

        def own(kind, name: str, *labels: str, **more):  # type: ignore[no-untyped-def]
            return kind(f"sglang_hma:{name}", name, labels, registry=self.registry, **more)

        self.started = own(Gauge, "start_time_seconds")
        self.used = own(Gauge, "kv_pages_used", "format")
        self.total = own(Gauge, "kv_pages_total", "format")
        if self.role == "prefill":
            self.sent = own(Counter, "kv_sent_bytes")
            self.overlap = own(Histogram, "kv_overlap_ratio", buckets=(0.5, 1.0))
            self.oldest = own(Gauge, "kv_oldest_write_seconds")
        else:
            self.wrong = own(Counter, "kv_checksum_failures")

    def answer(self, path: str) -> tuple[int, bytes]:
        return (200, self.text().encode()) if path == "/metrics" else (404, b"Not Found")


def router_of(*urls: str) -> Answer:
    listed = json.dumps({"workers": [{"url": url, "worker_type": "x"} for url in urls]}).encode()
    return lambda path: (200, listed) if path == "/workers" else (404, b"")


@contextmanager
def pair() -> Iterator[tuple[Server, Server, str]]:
    """Prefill and decode, and the URL of a router that lists decode first."""
    prefill, decode = Server("prefill"), Server("decode")
    with ExitStack() as stack:
        servers = [stack.enter_context(answering(one.answer)) for one in (decode, prefill)]
        yield prefill, decode, stack.enter_context(answering(router_of(*servers)))


def load(prefill: Server, decode: Server) -> None:
    prefill.tokens("prefill_compute", 500)
    prefill.sent.inc(30e6)
    for ratio in (0.4, 0.8):
        prefill.overlap.observe(ratio)
    decode.tokens("decode", 200)
    for number in range(100):
        decode.request(10, 20, ttft_s=0.05 + 0.009 * number, tpot_s=0.003)
    decode.request(10, 20, ttft_s=300.0, tpot_s=7.0, streamed=False)


def test_a_pair_behind_its_router() -> None:
    now = [0.0]
    with pair() as (prefill, decode, router):
        watch = Watch([router, router], 30.0, lambda: now[0])
        load(prefill, decode)  # before the first look: in no rate
        first = watch.look()
        assert [row.role for row in first if isinstance(row, Reading)] == ["prefill", "decode"]
        for row in first:
            assert isinstance(row, Reading)
            assert row.ttft_s is None and row.overlap is None and row.decode_tokens_s == 0
        load(prefill, decode)
        prefill.gauge("num_queue_reqs", 4)
        prefill.gauge("num_prefill_bootstrap_queue_reqs", 1)
        prefill.oldest.set(12.5)
        prefill.used.labels("bfp8").set(7)
        prefill.total.labels("bfp8").set(64)
        decode.gauge("num_running_reqs", 3)
        decode.used.labels("bf16").set(2)
        decode.total.labels("bf16").set(34)
        decode.wrong.inc(2)
        now[0] = 10.0
        sends, makes = watch.look()
    assert isinstance(sends, Reading) and isinstance(makes, Reading)
    assert (sends.role, sends.running, sends.queued) == ("prefill", 0, 5)
    assert (sends.prefill_tokens_s, sends.link_mb_s) == (50, 3)
    assert sends.overlap == pytest.approx(0.6)
    assert (sends.oldest_write_s, sends.pages) == (12.5, {"bfp8": (7, 64)})
    assert (sends.checksum_failures, sends.ttft_s) == (None, None)
    assert (makes.role, makes.running, makes.decode_tokens_s) == ("decode", 3, 20)
    assert (makes.checksum_failures, makes.pages) == (2, {"bf16": (2, 34)})
    assert makes.link_mb_s is None and makes.oldest_write_s is None
    # To a bucket, which is 0.2 s wide. Requests that are not streamed would be the slowest.
    assert makes.ttft_s is not None and makes.tpot_s is not None
    assert makes.ttft_s == pytest.approx((0.5, 0.86, 0.94), abs=0.2)
    assert max(makes.tpot_s) <= 0.004


def test_rates_are_of_the_last_seconds_only() -> None:
    now = [0.0]
    with pair() as (prefill, decode, router):
        watch = Watch([router], 10.0, lambda: now[0])
        watch.look()
        load(prefill, decode)
        for at in (5.0, 10.0, 15.0):
            now[0] = at
            rows = watch.look()
        assert all(isinstance(row, Reading) for row in rows)
        assert [row.prefill_tokens_s for row in rows if isinstance(row, Reading)] == [0, 0]
        prefill.restart()  # its counters begin again
        prefill.tokens("prefill_compute", 100)
        now[0] = 20.0
        (row, _) = watch.look()
    assert isinstance(row, Reading) and row.prefill_tokens_s == 10


def test_a_server_may_go_and_come_back() -> None:
    gone = [True]
    server = Server("decode")

    def answer(path: str) -> tuple[int, bytes]:
        return (503, b"starting") if gone[0] else server.answer(path)

    with answering(answer) as url, answering(router_of(url)) as router:
        watch = Watch([router], 30.0)
        (row,) = watch.look()
        assert row == Silent(url, "HTTP 503: starting")
        gone[0] = False
        (row,) = watch.look()
        assert isinstance(row, Reading) and row.role == "decode"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda path: (404, b""), "HTTP 404; start the server with --enable-metrics"),
        (lambda path: (200, b"smg_worker_health 1\n"), "the one that the router serves on"),
        (router_of(), "a router without servers"),
        (router_of("file:///etc/passwd"), "URL is 'file:///etc/passwd'"),
        (router_of("http://h:1/../x"), "URL is 'http://h:1/../x'"),
        (lambda path: (200, b'{"workers": [3]}'), "without a list of servers"),
        (lambda path: (200, b"\xff\xff"), "without a list of servers"),
        (lambda path: (404 if "w" in path else 200, b"up 1\n"), "has no metric of a server"),
        (lambda path: (404 if "w" in path else 200, b"\x1b[2J{"), "not Prometheus' text format"),
    ],
)
def test_who_says_nothing_is_a_row_with_the_reason(answer: Answer, said: str) -> None:
    with answering(answer) as url:
        (row,) = Watch([url], 30.0).look()
    assert isinstance(row, Silent) and row.url == url
    assert said in row.reason and "\n" not in row.reason


def drawn(rows: list[Row]) -> str:
    console = Console(width=200, force_terminal=True)
    with console.capture() as captured:
        console.print(table(rows, 30.0), *reasons(rows))
    return captured.get()


def test_what_servers_say_moves_no_cursor() -> None:
    server = Server("\x1b[2Jdecode\x07")
    server.gauge("num_running_reqs", 1)
    with answering(server.answer) as url:
        (row,) = Watch([url], 30.0).look()
    assert isinstance(row, Reading)
    shown = drawn([row, Silent("http://h:1", "it said \x1b[H")])
    assert "\x1b[2J" not in shown and "\x1b[H" not in shown and "\x07" not in shown
    assert "?[2Jdecode?" in shown and "http://h:1: it said ?[H" in shown


def test_once_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pair() as (prefill, decode, router):
        prefill.started.set(0)
        load(prefill, decode)
        assert main([router, "127.0.0.1:1", "--once", "--interval", "0.01"]) == 0
        shown = capsys.readouterr().out
        assert main([router, "--once", "--json", "--interval", "0.01"]) == 0
        told = json.loads(capsys.readouterr().out)
    assert "prefill" in shown and "decode" in shown and "tokens/s" in shown
    assert "silent" in shown and "http://127.0.0.1:1: " in shown and "refused" in shown
    assert [server["role"] for server in told["servers"]] == ["prefill", "decode"]
    assert told["servers"][0]["link_mb_s"] == 0 and told["at"] > 0


def test_once_fails_if_nobody_says_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["127.0.0.1:1", "--once"]) == 1
    assert "silent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ftp://h:1"], "URL is 'ftp://h:1': give http://HOST:PORT"),
        (["http://"], "URL is 'http://': give http://HOST:PORT"),
        (["http://h:port"], "give http://HOST:PORT"),
        (["http://h:1/v1"], "give http://HOST:PORT"),
        (["h:1", "--interval", "0"], "--interval is 0: give seconds above 0"),
        (["h:1", "--window", "nan"], "--window is nan: give seconds above 0"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_urls_as_people_write_them() -> None:
    for text in ("h:1", "http://h:1", "http://h:1/", "h:1/metrics"):
        assert base_url(text) == "http://h:1"
    assert base_url("https://[::1]:8443") == "https://[::1]:8443"


def test_a_server_that_says_little_is_still_a_row() -> None:
    from sglang_hma.planner.live.history import Server as History

    history = History("x")
    history.add("sglang:num_running_reqs", {"engine_type": "unified"}, 1.0, 2.0)
    row = reading("http://h:1", history, 0.0)
    assert (row.role, row.running, row.up_s, row.pages) == ("unified", 2, None, {})
    assert "0 in, 0 out" in drawn([row])
