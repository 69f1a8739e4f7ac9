"""Leave no process behind, even if the launcher is killed.

Every child carries SGLANG_HMA_RUN_ID=<run id> in its environment, and its descendants
inherit it whatever sessions they make and whoever becomes their parent. So the processes
of a run are exactly those whose /proc/PID/environ shows its id, and only those are killed.
SGLANG_HMA_PROGRAM=<run id>/<name> tells one program of a run, with all that it started, from
others.

`python -m sglang_hma.launch.guardian RUN_ID` is the guardian: it outlives a killed launcher for
as long as it takes to kill the rest of the run and to clear away what the killed leave in /dev/shm
and in the run's folder.
Standard library only, so it starts at once.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sglang_hma.launch import run_folder
from sglang_hma.launch.shared_memory import Leftovers

RUN_ID_ENV = "SGLANG_HMA_RUN_ID"
PROGRAM_ENV = "SGLANG_HMA_PROGRAM"
# setproctitle, which SGLang and the router call, writes its title over the environment
# that /proc shows, unless this is set.
KEEP_ENVIRON = {"SPT_NOENV": "1"}
KILL_TIMEOUT_S = 10.0
LOOK_EVERY_S = 5.0
GUARDING = b"guarding\n"


def marked(run_id: str) -> dict[str, str]:
    """The environment variables that make a child, and all that it starts, part of a run."""
    return KEEP_ENVIRON | {RUN_ID_ENV: run_id}


def named(run_id: str, name: str) -> dict[str, str]:
    """Beside `marked`, for one program of the run."""
    return {PROGRAM_ENV: f"{run_id}/{name}"}


def kill_run(run_id: str) -> None:
    """SIGKILL every process that carries `run_id`, until none is found or KILL_TIMEOUT_S is up."""
    _kill(marked(run_id))


def kill_program(run_id: str, name: str) -> None:
    """The same for what one program of the run has started, and for itself."""
    _kill(named(run_id, name))


def _kill(marks: dict[str, str]) -> None:
    deadline = time.monotonic() + KILL_TIMEOUT_S
    empty_scans = 0
    # A process that is being forked or is inside execve shows no environment for a moment.
    while empty_scans < 3 and time.monotonic() < deadline:
        killed = 0
        for pid in carrying(marks):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        empty_scans = 0 if killed else empty_scans + 1
        time.sleep(0.03)


def carrying(marks: dict[str, str]) -> Iterator[int]:
    """Of every process with all of `marks` in its environment."""
    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and wanted.issubset(
                (process / "environ").read_bytes().split(b"\0")
            ):
                yield int(process.name)


def guard(run_id: str) -> None:
    """Wait until the launcher is gone (its end of our stdin closes), then kill its run."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # the launcher may be gone already
        os.write(1, GUARDING)
    left = Leftovers()
    while not select.select([0], [], [], LOOK_EVERY_S)[0]:
        left.look(carrying(marked(run_id)))
    left.look(carrying(marked(run_id)))
    kill_run(run_id)
    left.clear()
    run_folder.remove(run_id)


class Guardian:
    """The guardian process of a run. No other process may hold the write end of its pipe."""

    def __init__(self, run_id: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "sglang_hma.launch.guardian", run_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._popen.stdout is not None
        if self._popen.stdout.readline() != GUARDING:
            raise RuntimeError(f"the guardian process ended with exit code {self._popen.wait()}")

    def alive(self) -> bool:
        return self._popen.poll() is None

    def close(self) -> None:
        """Have it kill what is left of the run and clear up, and wait for that.

        Before anybody else kills: it sees what a process has mapped only while that lives.
        """
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):
            self._popen.stdin.close()
        self._popen.wait()


if __name__ == "__main__":
    guard(sys.argv[1])
