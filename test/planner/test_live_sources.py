"""Replies that are not what they should be, and histories that are."""

import socket
import threading
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest

from sglang_hma.planner.live import sources
from sglang_hma.planner.live.fetch import Unheard, get
from sglang_hma.planner.live.history import Histogram, Server

from .live_fleet import Exporter, answering


def one_line(error: pytest.ExceptionInfo[Unheard]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"Not Found", "HTTP 404; start the server with --enable-metrics"),
        (500, b"oh\nno", "HTTP 500: oh no"),
        (200, b"<html>hello</html>", "not Prometheus' text format"),
        (200, b'sglang:num_queue_reqs{tp_rank="0} 1\n', "not Prometheus' text format"),
        (200, b"sglang:num_queue_reqs many\n", "not Prometheus' text format"),
        (200, b'sglang:time_to_first_token_seconds_bucket{le="x"} 1\n', "not Prometheus' text"),
        (200, b"sglang:num_queue_reqs \xff\n", "not Prometheus' text format"),
        (200, b"node_load1 3\n", "name prefill and decode servers"),
        (200, b"", "name prefill and decode servers"),
    ],
)
def test_what_is_no_servers_metrics(status: int, body: bytes, said: str) -> None:
    with answering(lambda _: (status, body)) as url, pytest.raises(Unheard) as error:
        sources.scrape([url], 0.0)
    assert said in one_line(error)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>", "not a reply of Prometheus"),
        (200, b"\xff", "not a reply of Prometheus"),
        (200, b'{"status":"success"}', "HTTP 200: "),
        (400, b'{"status":"error","errorType":"bad_data","error":"parse\\nerror"}', "parse error"),
        (200, b'{"status":"success","data":{"resultType":"vector","result":[]}}', "a vector to"),
        (200, b'{"status":"success","data":{"resultType":"matrix","result":[]}}', "does it scrape"),
        (
            200,
            b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":{},'
            b'"values":[[1,"x"]]}]}}',
            "a sample that is no number",
        ),
        (
            200,
            b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":{},'
            b'"values":[["1",1]]}]}}',
            "not a reply of Prometheus",
        ),
        (404, b"404 page not found", "HTTP 404, not a reply of Prometheus"),
    ],
)
def test_what_is_no_prometheus(status: int, body: bytes, said: str) -> None:
    with answering(lambda _: (status, body)) as url, pytest.raises(Unheard) as error:
        sources.ask(url, 5)
    assert said in one_line(error)


def test_a_reply_has_a_size_and_a_time() -> None:
    def trickle() -> Iterator[bytes]:
        while True:
            yield b"#"
            time.sleep(0.01)

    with answering(lambda _: (200, b"x" * 5000)) as url:
        assert get(url, limit_bytes=5000) == (200, b"x" * 5000)
        with pytest.raises(Unheard, match="more than 4999 bytes"):
            get(url, limit_bytes=4999)
    late = pytest.raises(Unheard, match=r"no whole reply within 0\.2 s")
    with answering(lambda _: (200, trickle())) as url, late:
        get(url, timeout_s=0.2)


def test_a_reply_that_ends_early_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Unheard, match="ends 6 bytes early"):
            get(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


def test_the_environments_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with answering(lambda path: (200, path.encode())) as url:
        assert get(f"{url}/there", {"q": "a b"}) == (200, b"/there?q=a+b")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("10.0.0.1:30001", "http://10.0.0.1:30001/metrics"),
        ("http://a:1/", "http://a:1/metrics"),
        ("https://a/metrics", "https://a/metrics"),
    ],
)
def test_urls(given: str, url: str) -> None:
    assert sources.metrics_url(given) == url


def test_a_counter_grows_by_what_it_counted_since_it_last_began(seed: int) -> None:
    draw = Random(seed)
    server, value, expected, restarts = Server("s"), draw.uniform(0, 50), 0.0, 0
    server.add("c", {}, 0.0, value)
    for at in range(1, 200):
        if draw.random() < 0.1 and value > 0.01:
            value, restarts = 0.0, restarts + 1
        # Below what it was: a restart that has counted more since cannot be told.
        more = draw.uniform(0.0, 0.01) if value == 0 else draw.uniform(0.0, 9.0)
        value, expected = value + more, expected + more
        server.add("c", {}, float(at), value)
    assert server.increase("c") == pytest.approx(expected)
    assert server.restarted("c") == (restarts > 0)


def test_a_series_that_appears_later_began_at_nothing() -> None:
    server = Server("s")
    server.add("old", {}, 0.0, 7.0)
    server.add("old", {}, 10.0, 9.0)
    server.add("new", {"name": "x", "label": "y"}, 10.0, 5.0)
    assert server.increase("old") == 2.0
    assert server.increase("new") == server.increase("new", "label", "y") == 5.0
    assert server.increase("new", "label", "z") == 0.0


def test_other_ranks_and_parts_of_totals_are_left_out() -> None:
    server = Server("s")
    base = {"tp_rank": "0", "pp_rank": "0", "priority": ""}
    for labels in (
        base,
        base | {"tp_rank": "1"},
        base | {"pp_rank": "1"},
        base | {"priority": "3"},
    ):
        server.add("g", labels, 0.0, 4.0)
    server.add("g", base, 1.0, 6.0)
    server.add("g", base, 2.0, float("nan"))
    assert server.ends("g") == (4.0, 6.0)
    assert server.mean("g") == 5.0


def test_histograms_interpolate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bounds = np.sort(rng.uniform(0.01, 10, 8))
    values = rng.uniform(0, bounds[-1], 500)
    upto = [(values <= bound).sum() for bound in bounds]
    found = Histogram(
        dict(zip([*bounds, np.inf], [*upto, len(values)], strict=True)), float(values.sum())
    )
    for share in rng.uniform(0.01, 1, 20):
        expected = np.interp(share * len(values), [0, *upto], [0, *bounds])
        assert found.quantile(share) == pytest.approx(expected)
    for limit in rng.uniform(0, bounds[-1], 20):
        assert found.within(limit) == pytest.approx(
            np.interp(limit, [0, *bounds], [0, *upto]) / len(values)
        )
    assert found.mean == pytest.approx(values.mean())


def test_histograms_add_up_whatever_their_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def of(bounds: Any, values: Any) -> Histogram:
        counts = {float(bound): float((values <= bound).sum()) for bound in (*bounds, np.inf)}
        return Histogram(counts, float(values.sum()))

    first, second = rng.uniform(0, 9, 100), rng.uniform(0, 9, 70)
    same = of((1, 2, 5), first) + of((1, 2, 5), second)
    both = of((1, 2, 5), np.concatenate((first, second)))
    assert same.counts == both.counts
    assert same.total == pytest.approx(both.total)
    other = of((1, 5), first) + of((2, 5), second)
    assert other.counts[5.0] == (first <= 5).sum() + (second <= 5).sum()
    assert other.count == 170


def test_a_value_beyond_all_bounds_counts_as_the_last_of_them() -> None:
    exporter = Exporter("decode")
    server = Server("s")
    for at in (0.0, 1.0):
        for line in exporter.text().splitlines():
            if line.startswith("sglang:time_to_first_token_seconds_bucket"):
                bound = line.split('le="')[1].split('"')[0]
                labels = {"le": bound}
                server.add(
                    "sglang:time_to_first_token_seconds_bucket", labels, at, float(line.split()[-1])
                )
        server.add("sglang:num_queue_reqs", {}, at, 0.0)
        exporter.request(10, 10, 1e6, 0.01)
    found = server.histogram("sglang:time_to_first_token_seconds")
    assert found.count == 1
    assert found.quantile(0.5) == 400.0
    assert found.within(400.0) == 0.0
