"""Prometheus metrics of the transfer, on /metrics with --enable-metrics.

Created in the scheduler's process, after SGLang has set PROMETHEUS_MULTIPROC_DIR.
"""

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

PREFIX = "sglang_hma:kv_"
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)


@cache
def _metric(kind: Any, name: str, text: str, **kwargs: Any) -> Any:
    return kind(PREFIX + name, text, **kwargs)


class PrefillMetrics:
    def __init__(self) -> None:
        self.bytes = _metric(Counter, "sent_bytes", "KV and metadata bytes acknowledged by decode")
        self.seconds = _metric(Counter, "send_seconds", "Time that groups spent on the wire")
        self.groups = _metric(Counter, "sent_groups", "Groups of layers acknowledged by decode")
        self.failures = _metric(Counter, "failed_jobs", "Sends given up because writes failed")
        self.resends = _metric(Counter, "resent_ranges", "Ranges sent again after a wrong checksum")
        self.checksum_seconds = _metric(
            Counter, "checksum_seconds", "CPU time spent on making checksums"
        )
        self.overlap = _metric(
            Histogram,
            "overlap_ratio",
            "Share of a request's bytes that left before its last forward ended",
            buckets=RATIOS,
        )
        self.tail = _metric(
            Histogram,
            "exposed_tail_seconds",
            "From the end of a request's last forward to its last byte acknowledged",
            buckets=SECONDS,
        )
        self.unsettled_rooms = _metric(
            Gauge,
            "unsettled_rooms",
            "Requests whose failed writes may still be on their way; decode keeps their pages",
            multiprocess_mode="mostrecent",
        )

    def sent(self, size: int, seconds: float) -> None:
        """A group of `size` bytes was acknowledged."""
        self.bytes.inc(size)
        self.seconds.inc(seconds)
        self.groups.inc()

    def request(self, total: int, early: int, tail_s: float) -> None:
        if total:
            self.overlap.observe(early / total)
        self.tail.observe(tail_s)


class DecodeMetrics:
    def __init__(self) -> None:
        self.groups = _metric(Counter, "verified_groups", "Groups whose checksums were compared")
        self.mismatches = _metric(Counter, "checksum_failures", "Groups with a wrong checksum")
        self.verify_seconds = _metric(
            Counter, "verify_seconds", "CPU time spent on comparing checksums"
        )
        self.quarantined_pages = _metric(
            Gauge,
            "quarantined_pages",
            "Pages of failed requests, kept until prefill says that no write is on its way",
            multiprocess_mode="mostrecent",
        )
