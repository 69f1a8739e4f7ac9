"""A server or the router as a process: its output in a log file, its last lines kept."""

import contextlib
import itertools
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_hma.launch.logs import COLOURS, LogFile

TAIL_LINES = 400  # longer than a traceback
PIPE_BYTES = 1 << 20  # of output, while the launcher is stopped

# What a server is at, by words that SGLang logs when it begins.
STAGES = {
    "server_args=": "starting processes",
    "Load weight begin": "loading weights",
    "Load weight end": "allocating KV pages",
    "Uvicorn running on": "warming up",
}


@dataclass
class Program:
    """One child: `ready_url` answers 200 once it serves, `alive_url` anything while it lives."""

    name: str
    command: Sequence[str]
    ready_url: str
    alive_url: str
    env: dict[str, str]
    first_stage: str


class Child:
    """A started program in its own session. `show` gets its lines, with its name before them."""

    def __init__(
        self,
        program: Program,
        env: dict[str, str],
        log_dir: Path,
        show: Callable[[str], None] | None,
    ) -> None:
        self.program, self.name = program, program.name
        self.log = log_dir / f"{self.name}.log"
        self.stage = program.first_stage
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.popen = subprocess.Popen(
            program.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env | program.env,
            start_new_session=True,
            pipesize=PIPE_BYTES,
            encoding="utf-8",
            errors="replace",
        )
        pump = threading.Thread(target=self._copy, args=(LogFile(self.log), show), daemon=True)
        self._pump = pump
        pump.start()

    def alive(self) -> bool:
        return self.popen.poll() is None

    @property
    def killed(self) -> bool:
        return self.popen.returncode == -signal.SIGKILL

    def drain(self, timeout: float = 1.0) -> None:
        """Let the last output through; a surviving grandchild may hold the pipe open."""
        self._pump.join(timeout)

    def stop(self, timeout: float) -> None:
        """Collect a process that has been killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout)
        self.drain()

    def end(self) -> str:
        code = self.popen.returncode
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def _copy(self, log: LogFile, show: Callable[[str], None] | None) -> None:
        assert self.popen.stdout is not None
        begins = f"--- {time.strftime('%F %T')} {self.name} starts, process {self.popen.pid} ---"
        for line in itertools.chain([begins], self.popen.stdout):
            plain = COLOURS.sub("", line.rstrip("\n"))
            self.tail.append(plain)
            log.line(plain)
            self.stage = next((STAGES[words] for words in STAGES if words in plain), self.stage)
            if show:
                show(f"[{self.name}] {plain}")
        log.close()
