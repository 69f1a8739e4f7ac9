"""Samples of metrics over time, and what a counter, a gauge or a histogram says between them."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Labels = frozenset[tuple[str, str]]
Point = tuple[float, float]
"""Seconds of any one clock, and the value then."""


@dataclass
class Server:
    """What one server exported: series by name, then by labels."""

    name: str
    begin: float = math.inf
    end: float = -math.inf
    """Seconds of its first sample and its last."""
    _series: dict[str, dict[Labels, list[Point]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def add(self, name: str, labels: Mapping[str, str], at: float, value: float) -> None:
        """In the order of time. Ranks that repeat rank 0, and parts of a total, are left out.

        Raises ValueError for a bucket without a bound.
        """
        if name.endswith("_bucket"):
            float(labels.get("le", ""))
        self.begin, self.end = min(self.begin, at), max(self.end, at)
        ranks = {labels.get("tp_rank", "0"), labels.get("pp_rank", "0")}
        part = "tp_rank" in labels and labels.get("priority", "") != ""
        if ranks == {"0"} and not part and math.isfinite(value):
            self._series[name][frozenset(labels.items())].append((at, value))

    def then(self, later: "Server") -> "Server":
        """What this one exported, and what it exported later."""
        both = Server(self.name)
        for each in (self, later):
            for name, found in each._series.items():
                for labels, points in found.items():
                    both._series[name][labels] += points
            both.begin, both.end = min(both.begin, each.begin), max(both.end, each.end)
        return both

    def series(self, name: str, label: str = "", value: str = "") -> list[list[Point]]:
        """Of one metric; with `label`, where it has that value."""
        found = self._series.get(name, {}).items()
        return [points for labels, points in found if not label or (label, value) in labels]

    def values_of(self, label: str) -> set[str]:
        """That a label has in any series."""
        every = (labels for each in self._series.values() for labels in each)
        return {value for labels in every for key, value in labels if key == label}

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def increase(self, name: str, label: str = "", value: str = "") -> float:
        """Of counters, all of them together. One that appears later began at 0 then."""
        return sum(_since(self.begin, points) for points in self.series(name, label, value))

    def restarted(self, name: str) -> bool:
        """Whether a counter began again."""
        return any(
            after < before
            for points in self.series(name)
            for (_, before), (_, after) in pairwise(points)
        )

    def ends(self, name: str) -> tuple[float, float]:
        """Of gauges, all of them together: first and last."""
        found = self.series(name)
        return sum(p[0][1] for p in found), sum(p[-1][1] for p in found)

    def mean(self, name: str) -> float:
        """Of gauges that are each a share, over all of their samples; 0 where there is none."""
        values = [value for points in self.series(name) for _, value in points]
        return sum(values) / len(values) if values else 0.0

    def histogram(self, name: str, label: str = "", value: str = "") -> "Histogram":
        counts: dict[float, float] = defaultdict(float)
        for labels, points in self._series.get(f"{name}_bucket", {}).items():
            if not label or (label, value) in labels:
                counts[float(dict(labels)["le"])] += _since(self.begin, points)
        total = self.increase(f"{name}_sum", label, value)
        return Histogram(dict(sorted(counts.items())), total)


@dataclass(frozen=True)
class Histogram:
    """counts: of values up to each bound, the last of which is infinite. total: of all values."""

    counts: dict[float, float]
    total: float

    @property
    def count(self) -> float:
        return max(self.counts.values(), default=0.0)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """On a straight line within a bucket, as Prometheus' histogram_quantile; NaN of nothing.
        Values beyond the last finite bound count as that bound."""
        wanted = share * self.count
        if not self.count:
            return math.nan
        for low, below, high, above in self._buckets():
            if above >= wanted and above > below:
                inside = (wanted - below) / (above - below)
                return low if math.isinf(high) else low + (high - low) * inside
        return math.nan

    def within(self, limit: float) -> float:
        """The share of values up to `limit`, on the same lines; NaN of nothing."""
        if not self.count:
            return math.nan
        for low, below, high, above in self._buckets():
            if limit <= high:
                inside = 0.0 if math.isinf(high) else (limit - low) / (high - low)
                return (below + (above - below) * inside) / self.count
        return math.nan

    def _buckets(self) -> Iterator[tuple[float, float, float, float]]:
        """Lower bound and the count up to it, upper bound and the count up to that."""
        low = below = 0.0
        for high, above in self.counts.items():
            yield low, below, high, above
            low, below = high, above

    def __add__(self, other: "Histogram") -> "Histogram":
        bounds = sorted({*self.counts, *other.counts})
        counts = {bound: self._upto(bound) + other._upto(bound) for bound in bounds}
        return Histogram(counts, self.total + other.total)

    def _upto(self, bound: float) -> float:
        return max((n for own, n in self.counts.items() if own <= bound), default=0.0)


def grown(points: Sequence[Point]) -> float:
    """Of a counter. Where it falls, its server has started again, from 0."""
    return sum(
        after - before if after >= before else after for (_, before), (_, after) in pairwise(points)
    )


def _since(begin: float, points: Sequence[Point]) -> float:
    at, value = points[0]
    return grown(points) + (value if at > begin else 0.0)
