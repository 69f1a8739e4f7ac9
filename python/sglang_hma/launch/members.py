"""The processes that make up one server beside its HTTP process, and whether they live."""

import time
from collections.abc import Callable

import psutil

from sglang_hma.launch.pulse import ENDED, STOPPED, Pulse, state

TITLE = "sglang::"  # what SGLang calls its processes


class Members:
    """Schedulers and detokenizers among the descendants of process `root`, as they are now."""

    def __init__(
        self, root: int, every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every_s, self._clock = every_s, clock
        self._looked = clock()
        self._names: dict[int, str] = {}
        self._pulses: dict[int, Pulse] = {}
        self._stopped_s: dict[int, float] = {}
        for process in psutil.Process(root).children(recursive=True):
            title = " ".join(process.cmdline())
            if title.startswith(TITLE):
                self._names[process.pid] = title.removeprefix(TITLE).split()[0]
                self._pulses[process.pid] = Pulse(process.pid, every_s, clock)
                self._stopped_s[process.pid] = 0.0

    def look(self, answered: bool) -> None:
        """Call it about every `every_s` seconds; `answered`: a scheduler did, since the last
        time."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, 2 * self._every_s), now
        for pid, pulse in self._pulses.items():
            pulse.look(answered)
            stopped = state(pid) in STOPPED
            self._stopped_s[pid] = self._stopped_s[pid] + passed if stopped else 0.0

    def trouble(self) -> str | None:
        """Why nothing can be answered now, if that is plain to see."""
        states = {pid: state(pid) for pid in self._names}
        return self._first(ENDED, states, "is gone") or self._first(STOPPED, states, "is stopped")

    def fatal(self, hang_timeout: float) -> str | None:
        """Why nothing will be answered any more.

        A scheduler that computes is busy, for as long as it takes: SGLang's --watchdog-timeout is
        for a batch that never ends. Ranks wait for each other, so it takes one that computes.
        """
        gone = self._first(ENDED, {pid: state(pid) for pid in self._names}, "is gone")
        if gone:
            return gone
        for pid, seconds in self._stopped_s.items():
            if seconds > hang_timeout:
                return f"{self._names[pid]} (process {pid}) is stopped since {seconds:.0f} s"
        silent = [
            pulse.silent_s
            for pid, pulse in self._pulses.items()
            if self._names[pid].startswith("scheduler")
        ]
        if silent and min(silent) > hang_timeout:
            return f"no scheduler has answered or computed for {min(silent):.0f} s"
        return None

    def _first(self, letters: str, states: dict[int, str], what: str) -> str | None:
        for pid, letter in states.items():
            if letter in letters:
                return f"{self._names[pid]} (process {pid}) {what}"
        return None
