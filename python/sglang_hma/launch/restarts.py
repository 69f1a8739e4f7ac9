"""When a program that died may start again."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RestartPolicy:
    """At most `limit` restarts of a program in `window_s` seconds, the first after `first_s`
    seconds, each further one of the window after twice as long, up to `longest_s`."""

    limit: int = 5
    window_s: float = 600.0
    first_s: float = 1.0
    longest_s: float = 30.0


class Restarts:
    """Of one program."""

    def __init__(self, policy: RestartPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy, self._clock = policy, clock
        self._deaths: deque[float] = deque()

    def died(self) -> float | None:
        """Seconds until it may start again; None if it has died too often."""
        policy, now = self._policy, self._clock()
        while self._deaths and self._deaths[0] <= now - policy.window_s:
            self._deaths.popleft()
        if len(self._deaths) >= policy.limit:
            return None
        self._deaths.append(now)
        return min(policy.first_s * 2.0 ** (len(self._deaths) - 1), policy.longest_s)

    @property
    def any(self) -> bool:
        return bool(self._deaths)

    def __str__(self) -> str:
        policy = self._policy
        return f"restart {len(self._deaths)} of {policy.limit} in {policy.window_s:g} s"
