"""Resident memory of processes over time, and how fast it grows."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .background import Background

MB = 1e6
Who = tuple[int, str]  # process, and what it is


@dataclass
class Sample:
    time_s: float
    requests: int
    rss: dict[Who, int]
    served: Mapping[str, int] = field(default_factory=dict)  # how often each serves again


@dataclass
class Memory(Background):
    """Samples `look()` every `every_s` seconds, and what `requests()` and `served()` say then."""

    look: Callable[[], dict[Who, int]]
    requests: Callable[[], int]
    served: Callable[[], Mapping[str, int]] = dict
    every_s: float = 2.0
    samples: list[Sample] = field(default_factory=list)

    def _work(self) -> None:
        while not self.stop.wait(self.every_s):
            sample = Sample(time.monotonic(), self.requests(), self.look(), self.served())
            self.samples.append(sample)

    def whole(self) -> set[Who]:
        """Processes that are in every sample."""
        return (
            set.intersection(*(set(each.rss) for each in self.samples)) if self.samples else set()
        )


def slope(samples: list[Sample], who: Who) -> float:
    """MB per 1,000 requests, by least squares over the samples that have this process."""
    points = [(each.requests, each.rss[who]) for each in samples if who in each.rss]
    if len({requests for requests, _ in points}) < 2:
        return 0.0
    requests, rss = np.array(points, dtype=np.float64).T
    return float(np.polyfit(requests / 1000, rss / MB, 1)[0])


def growth(samples: list[Sample], who: Who, settled_s: float) -> float:
    """MB between the median of the first three samples `settled_s` seconds after this process's
    server began to serve, and that of the last three; 0 if it did not serve for so long. One that
    is there from the first sample on serves then."""
    own = [each for each in samples if who in each.rss]
    server = who[1].partition(" ")[0]
    before = -1 if own[0] is samples[0] else own[0].served.get(server, 0)
    serving = [each for each in own if each.served.get(server, 0) > before]
    old = [each.rss[who] for each in serving if each.time_s >= serving[0].time_s + settled_s]
    if len(old) < 6:
        return 0.0
    return float(np.median(old[-3:]) - np.median(old[:3])) / MB
