"""Run servers and a router as one fleet: start, watch, stop, leave nothing behind."""

import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from sglang_hma.launch.console import console
from sglang_hma.launch.diagnosis import diagnose
from sglang_hma.launch.guardian import KILL_TIMEOUT_S, Guardian, kill_run, marked
from sglang_hma.launch.program import Child, Program

GRACE_S = 15.0
ROUTER_GRACE_S = 5.0
TICK_S = 0.1
POLL_S = 0.25
# One Ctrl-C may arrive twice, from the terminal and from a wrapper that forwards it.
SAME_SIGNAL_S = 0.5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


T = TypeVar("T")


class FleetError(Exception):
    """Why a fleet cannot go on, in one line."""


class _StopRequestedError(Exception):
    pass


class Fleet:
    """Servers, then a router, then a first request; all of them until one ends or we are told.

    `first_request` runs on a thread once everything is healthy; it returns a shell line that
    sends it again, a FleetError from it ends the fleet. The log of each program is
    `log_dir`/NAME.log; `verbose` prints it too.
    """

    def __init__(
        self,
        servers: Sequence[Program],
        router: Program,
        first_request: Callable[[], str],
        *,
        url: str,
        run_id: str,
        timeout: float,
        log_dir: Path,
        verbose: bool = False,
        grace: float = GRACE_S,
    ) -> None:
        self._servers, self._router, self._first_request = servers, router, first_request
        self._url, self._run_id, self._log_dir = url, run_id, log_dir
        self._timeout, self._verbose, self._grace = timeout, verbose, grace
        self._console = console(sys.stdout, sys.stderr)
        self._env = os.environ | marked(run_id)
        self._children: list[Child] = []
        self._guardian: Guardian | None = None
        self._serving = False
        self._signals: list[tuple[float, int]] = []

    def run(self) -> int:
        """Exit code: 0 after a requested stop, 1 if something ended or failed by itself."""
        self._catch_signals()
        code, last_words = 0, ""
        try:
            self._guardian = Guardian(self._run_id)
            self._begin()
            self._serving = True
            while True:
                self._tick()
        except _StopRequestedError:
            self._console.line("sglang-hma stopping; a second Ctrl-C kills")
            last_words = f"sglang-hma stopped on {signal.Signals(self._signals[0][1]).name}"
        except FleetError as error:
            code, last_words = 1, f"sglang_hma.launch_pd: error: {error}"
        finally:
            self._stop()
        (self._console.error if code else self._console.line)(last_words)
        # Python's exit takes a moment, in which a signal would change the exit code.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        return code

    def _begin(self) -> None:
        self._start(self._servers)
        names = ", ".join(program.name for program in self._servers)
        self._wait(f"starting {names}", self._each(_answers))
        # The router looks at its servers every few seconds: the sooner they answer, the better.
        self._start([self._router])
        self._wait("connecting the router", self._each(_is_ready))
        first = _background(self._first_request)
        self._wait("waiting for a first answer", {"the first answer": first})
        self._announce(first.result())

    def _announce(self, curl: str) -> None:
        names = ",".join(child.name for child in self._children)
        seconds = self._console.elapsed()
        self._console.status("")
        self._console.line(f"sglang-hma ready: {self._url} ({seconds:.0f} s)")
        self._console.line(f"  try:  {curl}")
        self._console.line(f"  logs: {self._log_dir}/{{{names}}}.log")
        self._console.line(f"  stop: Ctrl-C, or kill {os.getpid()}")

    def _catch_signals(self) -> None:
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in STOP_SIGNALS[:2] if nohup else STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signals or now > self._signals[-1][0] + SAME_SIGNAL_S:
            self._signals.append((now, number))

    def _start(self, programs: Sequence[Program]) -> None:
        show = self._console.line if self._verbose else None
        for program in programs:
            self._children.append(Child(program, self._env, self._log_dir, show))

    def _each(self, test: Callable[[int], bool]) -> dict[str, Future[None]]:
        """By name of each child: done when the status that its ready_url answers passes `test`."""
        return {
            child.name: _background(partial(_poll, child.program.ready_url, test))
            for child in self._children
        }

    def _wait(self, phase: str, futures: Mapping[str, Future[Any]]) -> None:
        while pending := [name for name, future in futures.items() if not future.done()]:
            elapsed = self._console.elapsed()
            if elapsed > self._timeout:
                raise FleetError(
                    f"{', '.join(pending)} not ready after {elapsed:.0f} s: see the logs in "
                    f"{self._log_dir}, or raise --timeout"
                )
            self._console.status(phase, self._stages(pending))
            self._tick()
        for future in futures.values():
            future.result()

    def _stages(self, names: Sequence[str]) -> str:
        """What each of the children `names` is at: "a, b: loading weights; c: warming up"."""
        at: dict[str, list[str]] = {}
        for child in self._children:
            if child.name in names:
                at.setdefault(child.stage, []).append(child.name)
        return "; ".join(f"{', '.join(same)}: {stage}" for stage, same in at.items())

    def _tick(self) -> None:
        time.sleep(TICK_S)
        if self._signals:
            raise _StopRequestedError
        for child in self._children:
            if not child.alive():
                raise FleetError(self._obituary(child))
        if self._guardian and not self._guardian.alive():
            self._console.line("sglang-hma: the guardian process was killed; started again")
            self._guardian = Guardian(self._run_id)

    def _obituary(self, child: Child) -> str:
        child.drain()
        if self._serving:
            return f"{child.name} {child.end()}, so all stopped; log: {child.log}"
        found = diagnose(list(child.tail), child.killed)
        self._console.error(f"{child.name} failed, {child.log} ends with:")
        for line in found.words:
            self._console.error(f"  {line}")
        # SGLang kills itself when it has said why.
        how = "failed" if found.explained and child.killed else child.end()
        what_to_do = f": {found.remedy}" if found.remedy else f"; log: {child.log}"
        return f"{child.name} {how} while starting{what_to_do}"

    def _stop(self) -> None:
        """Router first, then the servers, then SIGKILL for whatever carries the run's id."""
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
        if len(self._signals) > signals:
            self._console.line("sglang-hma killing what is left")
        kill_run(self._run_id)
        for child in self._children:
            child.stop(KILL_TIMEOUT_S)
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


def _answers(status: int) -> bool:
    return status > 0


def _is_ready(status: int) -> bool:
    return status == 200


def _poll(url: str, test: Callable[[int], bool]) -> None:
    """Return once the HTTP status of `url` passes `test`."""
    while not test(_status(url)):
        time.sleep(POLL_S)


def _status(url: str) -> int:
    """0 for no answer."""
    try:
        with direct.open(url, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, HTTPException):
        return 0
