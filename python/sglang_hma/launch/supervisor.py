"""Run servers and a router as one fleet: start, watch, stop, leave nothing behind."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

from sglang_hma.launch.guardian import KILL_TIMEOUT_S, Guardian, kill_run, marked

GRACE_S = 15.0
ROUTER_GRACE_S = 5.0
TICK_S = 0.1
TAIL_LINES = 20
STATUS_EVERY_S = 10.0
# One Ctrl-C may arrive twice, from the terminal and from a wrapper that forwards it.
SAME_SIGNAL_S = 0.5
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


T = TypeVar("T")


class FleetError(Exception):
    """Why a fleet cannot go on, in one line."""


class _StopRequestedError(Exception):
    pass


class Console:
    """Whole lines on stdout and stderr from several threads, and one status line below them."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err
        self._tty = out.isatty()
        self._lock = threading.Lock()
        self._status = ""
        self._status_time = time.monotonic()

    def line(self, text: str) -> None:
        with self._lock:
            self._write(f"{self._clear()}{text}\n{self._status if self._tty else ''}")

    def error(self, text: str) -> None:
        self.status("")
        with self._lock, contextlib.suppress(OSError):
            self._err.write(f"{text}\n")
            self._err.flush()

    def status(self, text: str) -> None:
        """Replace the status line of a terminal; elsewhere print it every STATUS_EVERY_S."""
        if self._tty:
            text = text[: shutil.get_terminal_size().columns - 1]
        with self._lock:
            if self._tty and text != self._status:
                self._write(self._clear() + text)
                self._status = text
            elif not self._tty and text and time.monotonic() > self._status_time + STATUS_EVERY_S:
                self._write(text + "\n")
                self._status_time = time.monotonic()

    def _clear(self) -> str:
        return "\r\033[K" if self._status else ""

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            # The reader is gone. The fleet goes on, its output goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


@dataclass
class Program:
    """One child: `ready_url` answers 200 once it serves."""

    name: str
    command: Sequence[str]
    ready_url: str
    env: dict[str, str]


class Child:
    """A started program in its own session, its output prefixed, its last lines kept."""

    def __init__(
        self, program: Program, env: dict[str, str], console: Console, log_dir: Path | None
    ) -> None:
        self.program, self.name = program, program.name
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        log = (log_dir / f"{self.name}.log").open("w") if log_dir else None
        self.popen = subprocess.Popen(
            program.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env | program.env,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        )
        self._pump = threading.Thread(target=self._copy, args=(console, log), daemon=True)
        self._pump.start()

    def alive(self) -> bool:
        return self.popen.poll() is None

    def drain(self, timeout: float = 1.0) -> None:
        """Let the last output through; a surviving grandchild may hold the pipe open."""
        self._pump.join(timeout)

    def end(self) -> str:
        code = self.popen.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _copy(self, console: Console, log: TextIO | None) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            plain = COLOURS.sub("", line.rstrip("\n"))
            self.tail.append(plain)
            console.line(f"[{self.name}] {plain}")
            if log:
                with contextlib.suppress(OSError):
                    log.write(plain + "\n")
                    log.flush()


class Fleet:
    """Servers, then a router, then a first request; all of them until one ends or we are told.

    `first_request` runs on a thread once everything is healthy; the line it returns is
    printed as the ready line, a FleetError from it ends the fleet.
    """

    def __init__(
        self,
        servers: Sequence[Program],
        router: Program,
        first_request: Callable[[], str],
        *,
        run_id: str,
        timeout: float,
        log_dir: Path | None = None,
        grace: float = GRACE_S,
    ) -> None:
        self._servers, self._router, self._first_request = servers, router, first_request
        self._run_id, self._timeout, self._log_dir, self._grace = run_id, timeout, log_dir, grace
        self._console = Console(sys.stdout, sys.stderr)
        self._env = os.environ | marked(run_id)
        self._children: list[Child] = []
        self._guardian: Guardian | None = None
        self._serving = False
        self._signals: list[tuple[float, int]] = []
        self._started = time.monotonic()

    def run(self) -> int:
        """Exit code: 0 after a requested stop, 1 if something ended or failed by itself."""
        self._catch_signals()
        code, last_words = 0, ""
        try:
            self._guardian = Guardian(self._run_id)
            self._start(self._servers)
            self._start([self._router])
            ready = _background(self._first_request)
            self._wait({"the first request": ready})
            self._console.line(ready.result())
            self._serving = True
            while True:
                self._tick()
        except _StopRequestedError:
            last_words = f"sglang-hma stopped on {signal.Signals(self._signals[0][1]).name}"
        except FleetError as error:
            code, last_words = 1, f"sglang_hma.launch_pd: error: {error}"
        finally:
            self._stop()
        (self._console.error if code else self._console.line)(last_words)
        return code

    def _catch_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signals or now > self._signals[-1][0] + SAME_SIGNAL_S:
            self._signals.append((now, number))

    def _start(self, programs: Sequence[Program]) -> None:
        """Start programs together and return when all of them answer."""
        healthy: dict[str, Future[None]] = {}
        for program in programs:
            child = Child(program, self._env, self._console, self._log_dir)
            self._children.append(child)
            healthy[program.name] = _background(partial(_poll, program.ready_url))
        self._wait(healthy)

    def _wait(self, futures: Mapping[str, Future[Any]]) -> None:
        while pending := ", ".join(name for name, future in futures.items() if not future.done()):
            elapsed = time.monotonic() - self._started
            if elapsed > self._timeout:
                raise FleetError(
                    f"{pending} not ready after {elapsed:.0f} s: see its log, or raise --timeout"
                )
            self._console.status(f"sglang-hma: waiting for {pending} ({elapsed:.0f} s)")
            self._tick()
        self._console.status("")
        for future in futures.values():
            future.result()

    def _tick(self) -> None:
        time.sleep(TICK_S)
        if self._signals:
            raise _StopRequestedError
        for child in self._children:
            if not child.alive():
                raise FleetError(self._obituary(child))
        if self._guardian and not self._guardian.alive():
            self._guardian = Guardian(self._run_id)

    def _obituary(self, child: Child) -> str:
        if self._serving:
            return f"{child.name} ended by itself, {child.end()}; stopping the others"
        child.drain()
        self._console.error(f"last {len(child.tail)} lines of {child.name}:")
        for line in child.tail:
            self._console.error(f"  {line}")
        return f"{child.name} ended while starting, {child.end()}; stopping the others"

    def _stop(self) -> None:
        """Router first, then the servers, then SIGKILL for whatever carries the run's id."""
        self._console.status("")
        signals = len(self._signals)
        deadline = time.monotonic() + self._grace
        routers = [child for child in self._children if child.program is self._router]
        servers = [child for child in self._children if child.program is not self._router]
        for group, grace in ((routers, ROUTER_GRACE_S), (servers, self._grace)):
            until = min(deadline, time.monotonic() + grace)
            for child in group:
                child.popen.terminate()
            while any(child.alive() for child in group) and time.monotonic() < until:
                if len(self._signals) > signals:
                    break
                time.sleep(TICK_S / 2)
        kill_run(self._run_id)
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.popen.wait(KILL_TIMEOUT_S)
            child.drain()
        if self._guardian:
            self._guardian.close()


def _background(call: Callable[[], T]) -> "Future[T]":
    """Run `call` on a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _poll(url: str) -> None:
    """Return once `url` answers 200."""
    while True:
        with contextlib.suppress(OSError, HTTPException), direct.open(url, timeout=10) as reply:
            if reply.status == 200:
                return
        time.sleep(0.5)
