"""What a recorded batch amounts to: operations, calls of the host, bytes, products."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmark.tenstorrent.driven import Recording
from benchmark.tenstorrent.recorder import Call

# Where a call does not say at which fidelity it multiplies.
UNSAID = "HiFi2"


@dataclass(frozen=True)
class Counts:
    """Of one batch on one chip.

    host_calls: of all threads, a replayed trace counted once; of_forward: of the thread that runs
    the forward; host_calls_for: by Call.kind. Bytes of DRAM: of matmuls, their weights included; of
    attention; of all others. weights_streamed: how often, in the mean, a weight that is used is
    read; over 1 where requests of a batch are multiplied one by one. new_programs: that the first
    batch of its kind compiled while requests waited.
    """

    operations: int
    host_calls: int
    of_forward: int
    host_calls_for: dict[str, int]
    waits: int
    matmul_bytes: int
    attention_bytes: int
    other_bytes: int
    weight_bytes: int
    weights_streamed: float
    flops: dict[str, int]
    attention_flops: dict[str, int]
    up_bytes: int
    down_bytes: int
    link_bytes: int
    new_programs: int

    @property
    def outside_bytes(self) -> int:
        """Of DRAM, outside matmuls."""
        return self.attention_bytes + self.other_bytes


def count(recording: Recording, forward_thread: str = "MainThread") -> Counts:
    calls = recording.calls
    by_kind: Counter[str] = Counter()
    hosts: Counter[str] = Counter()
    for call in calls:
        by_kind[call.kind] += call.reads + call.writes
        hosts[call.kind] += call.host
    streamed = 0
    distinct: dict[int, int] = {}
    for call in calls:
        for number, size in call.weights:
            streamed += size
            distinct[number] = size
    weights = sum(distinct.values())
    return Counts(
        operations=sum(call.programs for call in calls),
        host_calls=sum(call.host for call in calls),
        of_forward=sum(call.host for call in calls if call.thread == forward_thread),
        host_calls_for=dict(hosts),
        waits=sum(call.waits for call in calls if call.thread == forward_thread),
        matmul_bytes=by_kind["matmul"],
        attention_bytes=by_kind["attention"],
        other_bytes=sum(by_kind.values()) - by_kind["matmul"] - by_kind["attention"],
        weight_bytes=weights,
        weights_streamed=streamed / weights if weights else 0.0,
        flops=_by_fidelity(call for call in calls if call.kind == "matmul"),
        attention_flops=_by_fidelity(call for call in calls if call.kind == "attention"),
        up_bytes=sum(call.up for call in calls),
        down_bytes=sum(call.down for call in calls),
        link_bytes=sum(call.link for call in calls),
        new_programs=recording.new_programs,
    )


def _by_fidelity(calls: Iterable[Call]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for call in calls:
        found[call.fidelity or UNSAID] += call.flops
    return dict(found)


@dataclass(frozen=True)
class Line:
    """Calls of one name together."""

    name: str
    calls: int
    host_calls: int
    bytes: int
    flops: int


def by_name(calls: Sequence[Call]) -> list[Line]:
    """Most bytes first."""
    names = dict.fromkeys(call.name for call in calls)
    lines = []
    for name in names:
        own = [call for call in calls if call.name == name]
        moved = sum(call.reads + call.writes for call in own)
        hosts, flops = sum(call.host for call in own), sum(call.flops for call in own)
        lines.append(Line(name, len(own), hosts, moved, flops))
    return sorted(lines, key=lambda line: -line.bytes)
