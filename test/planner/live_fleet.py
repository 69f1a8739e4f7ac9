"""Servers under a load that is known, as their /metrics tell it; and a Prometheus that read them.

The names and labels are SGLang's, the text and its types prometheus_client's.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)
from prometheus_client.parser import text_string_to_metric_families

TTFT = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
TPOT = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1),
    *(0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0),
)
GAUGES = (
    *("num_running_reqs", "num_queue_reqs", "num_prefill_bootstrap_queue_reqs"),
    *("num_decode_prealloc_queue_reqs", "num_decode_transfer_queue_reqs"),
    *("full_token_usage", "prealloc_full_token_usage"),
)
STAGES = ("run_batch", "process_batch_result", "idle", "recv_requests")


@dataclass
class Exporter:
    """One server's metrics. A tensor-parallel one has a second rank that repeats the first."""

    role: str
    model: str = "m"
    ranks: int = 1
    registry: CollectorRegistry = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """As a new process has them."""
        self.registry = CollectorRegistry()
        scheduler = ["model_name", "engine_type", "tp_rank", "pp_rank", "moe_ep_rank"]
        tokenizer = ["model_name", "engine_type"]

        def counter(name: str, *labels: str) -> Counter:
            return Counter(f"sglang:{name}", name, labels, registry=self.registry)

        def histogram(name: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(
                f"sglang:{name}", name, labels, buckets=buckets, registry=self.registry
            )

        self._stages = counter("scheduler_stage_seconds", *scheduler, "category", "forward_overlap")
        self._tokens = counter("realtime_tokens", *scheduler, "mode")
        self._requests = counter("num_requests", *tokenizer, "is_streaming")
        self._prompt = counter("prompt_tokens", *tokenizer, "is_streaming")
        self._made = counter("generation_tokens", *tokenizer, "is_streaming")
        self._ttft = histogram("time_to_first_token_seconds", TTFT, *tokenizer, "is_streaming")
        self._tpot = histogram(
            "request_time_per_output_token_seconds", TPOT, *tokenizer, "is_streaming"
        )
        self._gauges = {
            name: Gauge(f"sglang:{name}", name, scheduler, registry=self.registry)
            for name in GAUGES
        }
        for stage in STAGES:
            self.stage(stage, 0.0)

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def stage(self, category: str, seconds: float, overlap: str = "none") -> None:
        for rank in range(self.ranks):
            self._stages.labels(*self._scheduler(rank), category, overlap).inc(seconds)

    def tokens(self, mode: str, count: float) -> None:
        self._tokens.labels(*self._scheduler(0), mode).inc(count)

    def gauge(self, name: str, value: float) -> None:
        self._gauges[name].labels(*self._scheduler(0)).set(value)

    def request(
        self, prompt: int, made: int, ttft_s: float, tpot_s: float, *, streamed: bool = True
    ) -> None:
        """One that has just finished."""
        labels = (self.model, self.role, "true" if streamed else "false")
        for counter, value in ((self._requests, 1), (self._prompt, prompt), (self._made, made)):
            counter.labels(*labels).inc(value)
        if self.role == "decode":
            self._ttft.labels(*labels).observe(ttft_s)
            self._tpot.labels(*labels).observe(tpot_s)

    def _scheduler(self, rank: int) -> tuple[str, ...]:
        return (self.model, self.role, str(rank), "0", str(rank))


@contextmanager
def serving(*exporters: Exporter) -> Iterator[list[str]]:
    """Addresses of their /metrics, which show what each has at the time."""
    with ExitStack() as stack:
        urls = []
        for exporter in exporters:
            server, thread = start_http_server(0, "127.0.0.1", registry=Current(exporter))
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            urls.append(f"http://127.0.0.1:{server.server_port}")
        yield urls


class Current(CollectorRegistry):
    """The registry that an exporter has now."""

    def __init__(self, exporter: Exporter) -> None:
        super().__init__()
        self._exporter = exporter

    def collect(self):  # type: ignore[no-untyped-def]
        return self._exporter.registry.collect()


@dataclass
class Prometheus:
    """What it scraped: labels to samples. It answers a range of the metrics whose names match."""

    colon: str = ":"
    """What stands for the colon in names: version 2 gets an underscore from prometheus_client."""
    found: dict[tuple[tuple[str, str], ...], list[list[object]]] = field(default_factory=dict)
    queries: list[str] = field(default_factory=list)

    def scrape(self, at: float, **exporters: Exporter) -> None:
        for instance, exporter in exporters.items():
            for family in text_string_to_metric_families(exporter.text()):
                for sample in family.samples:
                    name = sample.name.replace(":", self.colon)
                    labels = {"__name__": name, "instance": instance, **sample.labels}
                    points = self.found.setdefault(tuple(sorted(labels.items())), [])
                    points.append([at, repr(sample.value)])

    def reply(self, query: str) -> dict[str, object]:
        self.queries.append(query)
        names = re.search(r'__name__=~"([^"]*)"', query)
        assert names
        assert re.search(r"\}\[\d+s\]$", query)
        result = [
            {"metric": dict(labels), "values": points}
            for labels, points in self.found.items()
            if re.fullmatch(names[1], dict(labels)["__name__"])
        ]
        return {"status": "success", "data": {"resultType": "matrix", "result": result}}


@contextmanager
def prometheus(told: Prometheus) -> Iterator[str]:
    def answer(path: str) -> tuple[int, bytes]:
        parts = urlsplit(path)
        if parts.path != "/api/v1/query":
            return 404, b"404 page not found"
        return 200, json.dumps(told.reply(parse_qs(parts.query)["query"][0])).encode()

    with answering(answer) as url:
        yield url


@contextmanager
def answering(answer) -> Iterator[str]:  # type: ignore[no-untyped-def]
    """A server whose `answer`(path) is a status and a body, an iterable of which comes in parts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.path)
            parts = [body] if isinstance(body, bytes) else body
            self.send_response(status)
            self.end_headers()
            try:
                for part in parts:
                    self.wfile.write(part)
            except OSError:
                return  # who asked has gone

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
