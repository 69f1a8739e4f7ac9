"""Whether a process computes, from /proc: what gives no answer may be busy, hung or stopped."""

import os
import time
from collections.abc import Callable
from pathlib import Path

HERTZ = os.sysconf("SC_CLK_TCK")
# Of a core, in the process's main thread, or in all its threads and children that have ended.
# A loop that only waits takes less, and so do threads that poll beside a main thread that hangs.
MAIN_THREAD_WORKS, PROCESS_WORKS = 0.02, 0.5
STOPPED, ENDED = "Tt", "ZX"


def state(pid: int) -> str:
    """The letter of proc_pid_stat(5); "X" if there is no such process."""
    return _stat(Path(f"/proc/{pid}"))[0]


def _stat(folder: Path) -> tuple[str, float, float]:
    """State, CPU seconds, and CPU seconds of children that were waited for."""
    try:
        # The name before the last ")" may hold anything.
        fields = (folder / "stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError:
        return "X", 0.0, 0.0
    own, children = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    return fields[0], own / HERTZ, children / HERTZ


class Pulse:
    """For how long a process has neither answered nor computed.

    Time counts as long as somebody looks: a pause of the whole machine, or of the process that
    calls `look`, is nobody's fault.
    """

    def __init__(
        self, pid: int, every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pid, self._every_s, self._clock = pid, every_s, clock
        self.silent_s = 0.0
        self._looked = clock()
        self._used = self._cpu()

    def look(self, answered: bool) -> float:
        """Call it about every `every_s` seconds; `answered`: since the last time."""
        now, used = self._clock(), self._cpu()
        passed = now - self._looked
        main, process = (after - before for after, before in zip(used, self._used, strict=True))
        works = main > MAIN_THREAD_WORKS * passed or process > PROCESS_WORKS * passed
        self._looked, self._used = now, used
        self.silent_s = 0.0 if answered or works else self.silent_s + min(passed, 2 * self._every_s)
        return self.silent_s

    def _cpu(self) -> tuple[float, float]:
        folder = Path(f"/proc/{self._pid}")
        _, main, _ = _stat(folder / "task" / str(self._pid))
        _, own, children = _stat(folder)
        return main, own + children
