"""Links that flows share equally.

A flow runs at the smallest of the shares that its links give it. What a slower link of the same
flow leaves unused is not given to others, so a result is never too good.
"""

import math
from collections.abc import Callable, Iterable

from sglang_hma.planner.simulation.clock import Clock


class Link:
    def __init__(self, bytes_s: float) -> None:
        self.bytes_s = bytes_s
        self.flows: dict[Flow, None] = {}


class Flow:
    """Bytes that appear at a steady pace until `ready_at`; the last `tail` of them, then."""

    __slots__ = ("_clock", "_done", "_left", "_rate", "_settled_at", "_turn", "ready_at", "tail")

    def __init__(
        self, clock: Clock, size: float, ready_at: float, tail: float, done: Callable[[], None]
    ) -> None:
        self._clock, self._done = clock, done
        self._left, self._rate, self._settled_at, self._turn = size, 0.0, clock.now, 0
        self.ready_at, self.tail = ready_at, tail

    def at_rate(self, rate: float, finish: Callable[["Flow"], None]) -> None:
        """From now on."""
        now = self._clock.now
        before = max(0.0, min(now, self.ready_at) - self._settled_at)
        after = now - self._settled_at - before
        if before:
            # Its tail is not there yet.
            self._left = max(self.tail, self._left - self._rate * before)
        self._left = max(0.0, self._left - self._rate * after)
        self._rate, self._settled_at = rate, now
        self._turn += 1
        turn = self._turn
        end = now + self._left / rate
        if now < self.ready_at:
            end = max(end, self.ready_at + self.tail / rate)

        def ended() -> None:
            if turn == self._turn:
                self._turn += 1
                finish(self)
                self._done()

        self._clock.at(end, ended)


class Network:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._routes: dict[Flow, tuple[Link, ...]] = {}

    def send(
        self,
        route: tuple[Link, ...],
        size: float,
        done: Callable[[], None],
        *,
        ready_at: float = -math.inf,
        tail: float = 0.0,
    ) -> None:
        """Calls `done` when `size` bytes have gone over all links of `route`.

        They appear until `ready_at`, the last `tail` of them only then.
        """
        flow = Flow(self._clock, size, ready_at, tail, done)
        self._routes[flow] = route
        for link in route:
            link.flows[flow] = None
        self._share(route)

    def _finish(self, flow: Flow) -> None:
        route = self._routes.pop(flow)
        for link in route:
            del link.flows[flow]
        self._share(route)

    def _share(self, links: Iterable[Link]) -> None:
        """Give the flows on these links their new rates."""
        touched = {flow: None for link in links for flow in link.flows}
        for flow in touched:
            rate = min(link.bytes_s / len(link.flows) for link in self._routes[flow])
            flow.at_rate(rate, self._finish)
