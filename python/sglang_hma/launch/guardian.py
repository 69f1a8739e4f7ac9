"""Leave no process behind, even if the launcher is killed.

Every child carries SGLANG_HMA_RUN_ID=<run id> in its environment, and its descendants
inherit it whatever sessions they make and whoever becomes their parent. So the processes
of a run are exactly those whose /proc/PID/environ shows its id, and only those are killed.

`python -m sglang_hma.launch.guardian RUN_ID` is the guardian: it outlives a killed launcher for
as long as it takes to kill the rest of the run. Standard library only, so it starts at once.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN_ID_ENV = "SGLANG_HMA_RUN_ID"
# setproctitle, which SGLang and the router call, writes its title over the environment
# that /proc shows, unless this is set.
KEEP_ENVIRON = {"SPT_NOENV": "1"}
KILL_TIMEOUT_S = 10.0
GUARDING = b"guarding\n"


def marked(run_id: str) -> dict[str, str]:
    """The environment variables that make a child, and all that it starts, part of a run."""
    return KEEP_ENVIRON | {RUN_ID_ENV: run_id}


def kill_run(run_id: str) -> None:
    """SIGKILL every process that carries `run_id`, until none is found or KILL_TIMEOUT_S is up."""
    marker = f"{RUN_ID_ENV}={run_id}".encode()
    deadline = time.monotonic() + KILL_TIMEOUT_S
    empty_scans = 0
    # A process that is being forked or is inside execve shows no environment for a moment.
    while empty_scans < 3 and time.monotonic() < deadline:
        found = [path for path in Path("/proc").iterdir() if path.name.isdecimal()]
        empty_scans = 0 if sum(_kill_marked(path, marker) for path in found) else empty_scans + 1
        time.sleep(0.03)


def _kill_marked(process: Path, marker: bytes) -> bool:
    try:
        if marker not in (process / "environ").read_bytes().split(b"\0"):
            return False
        os.kill(int(process.name), signal.SIGKILL)
    except OSError:
        return False
    return True


def guard(run_id: str) -> None:
    """Wait until the launcher is gone (its end of our stdin closes), then kill its run."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # the launcher may be gone already
        os.write(1, GUARDING)
    sys.stdin.buffer.read()
    kill_run(run_id)


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
        """Have it kill what is left of the run, and wait for that."""
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):
            self._popen.stdin.close()
        self._popen.wait()


if __name__ == "__main__":
    guard(sys.argv[1])
