"""How fast a link is, and how many layers to collect into one write because of it."""

import math
from collections import deque

import numpy as np


class LinkModel:
    """A link's latency and bandwidth, learnt from the last writes that were made.

    A write of n bytes takes latency + n / bandwidth; both come from a least
    squares fit of relative errors over the last SAMPLES writes, so a link that
    changes is known again after as many. Before the first write it is taken for
    a loopback of 0.2 ms and 1 GB/s.
    """

    SAMPLES = 32

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=self.SAMPLES)
        self.latency_s = 2e-4
        self.bytes_per_s = 1e9

    def observe(self, size: float, seconds: float) -> None:
        """A write of `size` bytes took `seconds`, not counting its wait for the one before."""
        if size < 1:
            return
        self._seen.append((size, max(seconds, 1e-6)))
        sizes, times = np.array(self._seen).T
        # Minimize sum(((a + b * size) / time - 1)**2) over a, b >= 0.
        ones, slopes = 1 / times, sizes / times
        xx, xy, yy = ones @ ones, ones @ slopes, slopes @ slopes
        x, y = ones.sum(), slopes.sum()
        determinant = xx * yy - xy * xy
        if determinant > 1e-6 * xx * yy:
            latency = (x * yy - y * xy) / determinant
            per_byte = (y * xx - x * xy) / determinant
            if latency >= 0 and per_byte > 0:
                self.latency_s, self.bytes_per_s = float(latency), float(1 / per_byte)
                return
        self.latency_s, self.bytes_per_s = 0.0, float(yy / y) if y else 1e9


class GroupSizer:
    """How many layers to wait for while the link is busy with earlier ones.

    An idle link takes whatever is ready: the first group leaves with the first
    layer. While it is busy, waiting costs nothing until the write in flight ends,
    and larger writes waste less of the link: `auto` (None) waits until a group's
    bytes take EFFICIENT times as long as the link's latency, but never for more
    than a quarter of the layers, because what is waited for last is exposed.
    """

    EFFICIENT = 4.0

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed

    def layers(self, link: LinkModel, layer_bytes: int, layers: int) -> int:
        if self.fixed is not None:
            return min(self.fixed, layers)
        wanted = math.ceil(self.EFFICIENT * link.latency_s * link.bytes_per_s / max(layer_bytes, 1))
        return max(1, min(wanted, layers // 4))
