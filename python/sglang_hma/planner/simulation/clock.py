"""SimPy's clock, with callbacks: what happens next is known as a time and a call."""

from collections.abc import Callable

import simpy

ASKED_EVERY = 2000  # events


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

    def run(self, hopeless: Callable[[], bool] = lambda: False) -> bool:
        """Until nothing is left to happen: True. False if `hopeless`, asked now and then, is."""
        try:
            while True:
                for _ in range(ASKED_EVERY):
                    self._env.step()
                if hopeless():
                    return False
        except simpy.core.EmptySchedule:
            return True
