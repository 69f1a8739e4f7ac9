"""What the transfer counts, on /metrics with --enable-metrics; gauges are in gauges.py.

Created in the scheduler's process, after SGLang has set PROMETHEUS_MULTIPROC_DIR.
"""

from typing import Any

from prometheus_client import Counter, Histogram

from sglang_hma.gauges import metric

# A gauge has one text, whichever role shows it.
STUCK_PEERS = (
    "Peers to look at: decode servers to which writes are on their way and none ended for 10 s; "
    "on a decode server, prefill servers whose last heartbeat has failed"
)
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


def _metric(kind: Any, name: str, text: str, **kwargs: Any) -> Any:
    return metric(kind, f"kv_{name}", text, **kwargs)


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
