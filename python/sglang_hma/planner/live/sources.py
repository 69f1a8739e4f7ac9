"""Where samples come from: servers' /metrics, read twice, or a Prometheus server."""

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from sglang_hma.planner.live.fetch import TIMEOUT_S, Unheard, get, shown
from sglang_hma.planner.live.history import Server

PREFIX, OURS = "sglang:", "sglang_hma:"
WANTED = (
    "scheduler_stage_seconds_total",
    "realtime_tokens_total",
    "num_requests_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "num_running_reqs",
    "num_queue_reqs",
    "num_prefill_bootstrap_queue_reqs",
    "num_decode_prealloc_queue_reqs",
    "num_decode_transfer_queue_reqs",
    "full_token_usage",
    "prealloc_full_token_usage",
    *("time_to_first_token_seconds_bucket", "time_to_first_token_seconds_sum"),
    *("request_time_per_output_token_seconds_bucket", "request_time_per_output_token_seconds_sum"),
)
ROUTER, ROUTED = "smg_", "smg_router_requests_total"
NAMES = frozenset((*(PREFIX + name for name in WANTED), ROUTED))


def scrape(
    urls: Sequence[str],
    interval_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Server]:
    """Each server's metrics, twice. Raises Unheard."""
    servers = [Server(url) for url in dict.fromkeys(map(metrics_url, urls))]
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(partial(read, clock), servers))
        sleep(interval_s)
        list(pool.map(partial(read, clock), servers))
    return servers


def metrics_url(url: str) -> str:
    """Of a server, which may be named with the path or without it."""
    whole = url if "://" in url else f"http://{url}"
    return whole if whole.rstrip("/").endswith("/metrics") else f"{whole.rstrip('/')}/metrics"


def read(
    clock: Callable[[], float],
    server: Server,
    *,
    names: Collection[str] = NAMES,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Add what a server exports now under these names. Raises Unheard."""
    status, body = get(server.name, timeout_s=timeout_s)
    at = clock()
    if status == 404:
        raise Unheard(f"{server.name}: HTTP 404; start the server with --enable-metrics")
    if status != 200:
        raise Unheard(f"{server.name}: HTTP {status}: {shown(body)}")
    found = 0
    try:
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                name = own_name(sample.name)
                found += name in names or name.startswith(ROUTER)
                if name in names:
                    server.add(name, sample.labels, at, sample.value)
    except (ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unheard(f"{server.name}: not Prometheus' text format: {reason}") from error
    if not found:
        raise Unheard(
            f"{server.name}: has no metric of a server's scheduler or of the router; name prefill "
            "and decode servers, which run with --enable-metrics"
        )


def own_name(name: str) -> str:
    """A metric's name as SGLang or sglang-hma has it.

    prometheus_client writes the colon as an underscore where a Prometheus asks for OpenMetrics
    without UTF-8 names, as version 2 does.
    """
    for own in (OURS, PREFIX):
        if name.startswith(own):
            return name
        if name.startswith(own.replace(":", "_")):
            return own + name[len(own) :]
    return name


class Series(msgspec.Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class Data(msgspec.Struct):
    resultType: str
    result: list[Series]


class Reply(msgspec.Struct):
    """Of /api/v1/query, asked for a range (prometheus.io/docs/prometheus/latest/querying/api)."""

    status: str
    data: Data | None = None
    error: str = ""


def ask(url: str, window_minutes: float, match: str = "") -> list[Server]:
    """Of every server that Prometheus scraped in the last minutes; `match`: label matchers in
    PromQL. Raises Unheard."""
    names = f'__name__=~"sglang[:_]({"|".join(WANTED)})|{ROUTED}"'
    selector = f"{{{names},{match}}}" if match else f"{{{names}}}"
    query = f"{selector}[{round(window_minutes * 60)}s]"
    status, body = get(f"{url.rstrip('/')}/api/v1/query", {"query": query})
    try:
        reply = msgspec.json.decode(body, type=Reply)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unheard(
            f"{url}: HTTP {status}, not a reply of Prometheus ({error}): {shown(body)}"
        ) from error
    if reply.status != "success" or reply.data is None:
        raise Unheard(f"{url}: HTTP {status}: {' '.join(reply.error.split())[:300]}")
    if reply.data.resultType != "matrix":
        raise Unheard(f"{url}: replies with a {reply.data.resultType} to a query for a range")
    servers: dict[str, Server] = {}
    try:
        for series in reply.data.result:
            labels = series.metric
            name = labels.get("instance", "?")
            server = servers.setdefault(name, Server(name))
            for at, value in series.values:
                server.add(own_name(labels.get("__name__", "")), labels, at, float(value))
    except ValueError as error:
        raise Unheard(f"{url}: a sample that is no number: {error}") from error
    if not servers:
        raise Unheard(
            f"{url}: has no {PREFIX} metric of the last {window_minutes:g} minutes"
            f"{' that fits --match ' + match if match else ''}; does it scrape servers that run "
            "with --enable-metrics?"
        )
    return list(servers.values())
