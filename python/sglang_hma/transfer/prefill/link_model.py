"""How fast a link is, and how many layers to collect into one group because of it."""

import math
from collections import deque

import numpy as np


class LinkModel:
    """A link's latency and bandwidth, measured with the last SAMPLES groups.

    A group of n bytes takes latency + n / bandwidth. Both come from a least squares fit of the
    relative errors. Until the first group they are those of a loopback: 0.2 ms and 1 GB/s.
    """

    SAMPLES = 32

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=self.SAMPLES)
        self.latency_s = 2e-4
        self.bytes_per_s = 1e9

    def observe(self, size: float, seconds: float) -> None:
        """A group of `size` bytes took `seconds`, without its wait for the one before."""
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
    """How many layers to wait for while the link is busy with an earlier group.

    On an idle link a group is whatever is ready. On a busy one waiting costs nothing until the
    earlier group ends, and a larger group loses less time to the link's latency. `auto` (None)
    waits until a group's bytes take EFFICIENT times as long as the latency, but never for more
    than a quarter of the layers: the last group of a request is not hidden by computation.
    """

    EFFICIENT = 4.0

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed

    def layers(self, link: LinkModel, layer_bytes: int, layers: int) -> int:
        if self.fixed is not None:
            return min(self.fixed, layers)
        enough = self.EFFICIENT * link.latency_s * link.bytes_per_s
        return max(1, min(math.ceil(enough / max(layer_bytes, 1)), layers // 4))
