"""What one server did between two looks at its metrics, and what it has now."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_hma.planner.live.history import Histogram, Server

QUANTILES = (0.5, 0.9, 0.99)

RUNNING = ("sglang:num_running_reqs", "sglang:num_prefill_inflight_queue_reqs")
QUEUED = (
    "sglang:num_queue_reqs",
    "sglang:num_prefill_bootstrap_queue_reqs",
    "sglang:num_decode_prealloc_queue_reqs",
    "sglang:num_decode_transfer_queue_reqs",
)
TOKENS = "sglang:realtime_tokens_total"
TTFT = "sglang:time_to_first_token_seconds"
TPOT = "sglang:request_time_per_output_token_seconds"

OURS = "sglang_hma:"
STARTED = OURS + "start_time_seconds"
PAGES_USED, PAGES_TOTAL = OURS + "kv_pages_used", OURS + "kv_pages_total"
SENT = OURS + "kv_sent_bytes_total"
OVERLAP = OURS + "kv_overlap_ratio"
CHECKSUM_FAILURES = OURS + "kv_checksum_failures_total"
OLDEST_WRITE = OURS + "kv_oldest_write_seconds"
QUARANTINED = OURS + "kv_quarantined_pages"
STUCK_PEERS = OURS + "kv_stuck_peers"

NAMES = frozenset(
    (
        *(*RUNNING, *QUEUED, TOKENS, STARTED, PAGES_USED, PAGES_TOTAL, SENT),
        *(CHECKSUM_FAILURES, OLDEST_WRITE, QUARANTINED, STUCK_PEERS),
        *(f"{name}_{part}" for name in (TTFT, TPOT, OVERLAP) for part in ("bucket", "sum")),
    )
)


@dataclass(frozen=True)
class Reading:
    """Rates, percentiles (QUANTILES) and the overlap are of the time between the two looks, the
    rest is of the last one. None where the server does not say, or nothing was there to say."""

    url: str
    role: str
    up_s: float | None
    running: float
    queued: float
    prefill_tokens_s: float
    decode_tokens_s: float
    ttft_s: tuple[float, ...] | None
    tpot_s: tuple[float, ...] | None
    pages: dict[str, tuple[int, int]]
    """By format: handed out, and all that there could be."""
    link_mb_s: float | None
    overlap: float | None
    checksum_failures: int | None
    quarantined_pages: int | None
    oldest_write_s: float | None
    stuck_peers: int | None


def reading(url: str, seen: Server, now_s: float) -> Reading:
    """`seen` has both looks, `now_s` is Unix time."""
    started, sent = _now(seen, STARTED), _now(seen, SENT)
    overlap = seen.histogram(OVERLAP)
    return Reading(
        url=url,
        role=_role(seen),
        up_s=None if started is None else max(now_s - started, 0.0),
        running=sum(seen.ends(name)[1] for name in RUNNING),
        queued=sum(seen.ends(name)[1] for name in QUEUED),
        prefill_tokens_s=_rate(seen, TOKENS, "mode", "prefill_compute"),
        decode_tokens_s=_rate(seen, TOKENS, "mode", "decode"),
        ttft_s=_quantiles(seen.histogram(TTFT, "is_streaming", "true")),
        tpot_s=_quantiles(seen.histogram(TPOT, "is_streaming", "true")),
        pages=_pages(seen),
        link_mb_s=None if sent is None else _rate(seen, SENT) / 1e6,
        overlap=overlap.mean if overlap.count else None,
        checksum_failures=_whole(_now(seen, CHECKSUM_FAILURES)),
        quarantined_pages=_whole(_now(seen, QUARANTINED)),
        oldest_write_s=_now(seen, OLDEST_WRITE),
        stuck_peers=_whole(_now(seen, STUCK_PEERS)),
    )


def _role(seen: Server) -> str:
    """SGLang tells it with the first request."""
    if told := seen.values_of("engine_type"):
        return " and ".join(sorted(told))
    own = {"prefill": OLDEST_WRITE, "decode": CHECKSUM_FAILURES}
    return next((role for role, name in own.items() if seen.series(name)), "server")


def _now(seen: Server, name: str) -> float | None:
    return seen.ends(name)[1] if seen.series(name) else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _rate(seen: Server, name: str, *label: str) -> float:
    return seen.increase(name, *label) / seen.seconds if seen.seconds > 0 else 0.0


def _quantiles(found: Histogram) -> tuple[float, ...] | None:
    values = tuple(found.quantile(share) for share in QUANTILES)
    return None if any(map(math.isnan, values)) else values


def _pages(seen: Server) -> dict[str, tuple[int, int]]:
    def last(name: str, page_format: str) -> int:
        points: Sequence[list[tuple[float, float]]] = seen.series(name, "format", page_format)
        return round(sum(each[-1][1] for each in points))

    formats = sorted(seen.values_of("format"))
    return {name: (last(PAGES_USED, name), last(PAGES_TOTAL, name)) for name in formats}
