"""SimPy's clock, with callbacks: what happens next is known as a time and a call."""

from collections.abc import Callable

import simpy

ASKED_EVERY = 500  # events


class Clock:
    def __init__(self) -> None:
        self._env = simpy.Environment()

    @property
    def now(self) -> float:
        """Seconds."""
        return self._env.now

    def at(self, when: float, call: Callable[[], None]) -> None:
        """`when` must not be past."""
        event = self._env.timeout(max(0.0, when - self._env.now))
        event.callbacks.append(lambda _: call())

    def run(self, decided: Callable[[], bool] = lambda: False) -> None:
        """Until nothing is left to happen, or `decided`, asked now and then, is true."""
        try:
            while True:
                for _ in range(ASKED_EVERY):
                    self._env.step()
                if decided():
                    return
        except simpy.core.EmptySchedule:
            return
