"""What the servers of each role did between the first sample and the last.

All of it is on with --enable-metrics (SGLang 0.5.23, srt/observability/metrics_collector.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from sglang_hma.planner.live.fetch import Unheard
from sglang_hma.planner.live.history import Histogram, Server
from sglang_hma.planner.live.sources import ROUTED

STAGES = "sglang:scheduler_stage_seconds_total"
TOKENS = "sglang:realtime_tokens_total"
REQUESTS = "sglang:num_requests_total"
# SGLang's scheduler launches a pass in one and waits for its end in the other.
COMPUTING = ("run_batch", "process_batch_result")
# Where requests are that decode has been given: all that are not answered yet.
UNDER_WAY = (
    "sglang:num_decode_prealloc_queue_reqs",
    "sglang:num_decode_transfer_queue_reqs",
    "sglang:num_queue_reqs",
    "sglang:num_running_reqs",
)
WAITING_FOR_PAGES, WAITING_FOR_KV = UNDER_WAY[:2]

GONE_S = 60.0  # the longest usual time between scrapes

Ends = tuple[float, float]
"""Of a number of requests: at the first sample and at the last."""


@dataclass(frozen=True)
class Prefill:
    """busy: share of the time in which each server computes a pass; None where servers do not say.
    queue: requests that wait for a pass. unclaimed: that wait for decode's pages."""

    servers: tuple[str, ...]
    busy: tuple[float, ...] | None
    requests_s: float
    tokens_s: float
    """That are computed: without those found in the prefix cache."""
    queue: Ends
    unclaimed: Ends


@dataclass(frozen=True)
class Decode:
    """running, pending: the share of each server's KV memory that running requests hold, and that
    requests hold whose KV is still on its way."""

    servers: tuple[str, ...]
    running: tuple[float, ...]
    pending: tuple[float, ...]
    requests: float
    """Finished between the first sample and the last."""
    requests_s: float
    tokens_s: float
    prompt_tokens: float
    output_tokens: float
    """Of a finished request, on average."""
    without_pages: Ends
    without_kv: Ends
    under_way: Ends
    ttft: Histogram
    tpot: Histogram
    """Both of streamed requests: of the others SGLang sees no first token before some dozens."""

    @property
    def batch(self) -> float:
        """Requests that decode side by side on all servers, on average, by Little's law; NaN where
        none was streamed."""
        return self.tokens_s * self.tpot.mean


@dataclass(frozen=True)
class Seen:
    prefill: Prefill
    decode: Decode
    routed_s: float | None
    """Requests a second that routers were given; None without one."""
    seconds: float
    restarted: tuple[str, ...]
    gone: tuple[str, ...]
    """Servers that are not counted: their samples end long before the others'."""


def see(servers: Iterable[Server]) -> Seen:
    """Raises Unheard where a role is missing, or there are servers of other kinds or models."""
    every = list(servers)
    models = {model for server in every for model in server.values_of("model_name")}
    if len(models) > 1:
        raise Unheard(
            f"the servers serve several models, {', '.join(sorted(models))}: name those of one, or "
            "--match 'model_name=\"...\"'"
        )
    end, begin = max(server.end for server in every), min(server.begin for server in every)
    late = max(GONE_S, (end - begin) / 10)
    alive = [server for server in every if end - server.end <= late]
    by_role: dict[str, list[Server]] = {"router": [], "prefill": [], "decode": []}
    for server in alive:
        by_role.setdefault(_role(server), []).append(server)
    routers, prefill, decode, *others = by_role.values()
    for server in (server for each in others for server in each):
        raise Unheard(
            f"{server.name}: serves as {_role(server)!r}, not as prefill or decode; an advice is "
            "for servers with one role each"
        )
    for role, found in (("prefill", prefill), ("decode", decode)):
        if not found:
            raise Unheard(f"no {role} server among {', '.join(each.name for each in every)}")
    for server in (*prefill, *decode):
        if not server.seconds > 0:
            raise Unheard(f"{server.name}: one sample only; take a longer time")
    return Seen(
        _prefill(prefill),
        _decode(decode),
        sum(_routed_s(router) for router in routers) if routers else None,
        end - begin,
        tuple(server.name for server in alive if server.restarted(STAGES)),
        tuple(server.name for server in every if server not in alive),
    )


def _role(server: Server) -> str:
    """What is no server of SGLang is a router."""
    found = server.values_of("engine_type")
    return " and ".join(sorted(found)) or "router"


def _routed_s(router: Server) -> float:
    """A router that was given nothing has no such metric."""
    return router.increase(ROUTED) / router.seconds if router.seconds > 0 else 0.0


def _prefill(servers: Sequence[Server]) -> Prefill:
    told = all(server.series(STAGES) for server in servers)
    return Prefill(
        _names(servers),
        tuple(map(busy, servers)) if told else None,
        _rate(servers, REQUESTS),
        _rate(servers, TOKENS, "mode", "prefill_compute"),
        _ends(servers, "sglang:num_queue_reqs"),
        _ends(servers, "sglang:num_prefill_bootstrap_queue_reqs"),
    )


def _decode(servers: Sequence[Server]) -> Decode:
    requests = _sum(servers, REQUESTS)
    tokens = _rate(servers, TOKENS, "mode", "decode")
    held = [server.mean("sglang:full_token_usage") for server in servers]
    pending = [server.mean("sglang:prealloc_full_token_usage") for server in servers]
    each = max(requests, 1.0)
    return Decode(
        _names(servers),
        tuple(max(0.0, all_of - part) for all_of, part in zip(held, pending, strict=True)),
        tuple(pending),
        requests,
        _rate(servers, REQUESTS),
        tokens,
        _sum(servers, "sglang:prompt_tokens_total") / each,
        _sum(servers, "sglang:generation_tokens_total") / each,
        _ends(servers, WAITING_FOR_PAGES),
        _ends(servers, WAITING_FOR_KV),
        _ends(servers, *UNDER_WAY),
        _histogram(servers, "sglang:time_to_first_token_seconds"),
        _histogram(servers, "sglang:request_time_per_output_token_seconds"),
    )


def busy(server: Server) -> float:
    """The share of its time in which a scheduler is at passes, over its data-parallel ranks."""
    ranks = max(1, len(server.values_of("dp_rank")))
    seconds = sum(server.increase(STAGES, "category", stage) for stage in COMPUTING)
    return min(1.0, seconds / server.seconds / ranks)


def _names(servers: Sequence[Server]) -> tuple[str, ...]:
    return tuple(server.name for server in servers)


def _sum(servers: Sequence[Server], name: str) -> float:
    return sum(server.increase(name) for server in servers)


def _rate(servers: Sequence[Server], name: str, *label: str) -> float:
    """A second, each server over its own time."""
    return sum(server.increase(name, *label) / server.seconds for server in servers)


def _ends(servers: Sequence[Server], *names: str) -> Ends:
    ends = [server.ends(name) for server in servers for name in names]
    return sum(first for first, _ in ends), sum(last for _, last in ends)


def _histogram(servers: Sequence[Server], name: str) -> Histogram:
    streamed = (name, "is_streaming", "true")
    return reduce(add, [server.histogram(*streamed) for server in servers])
