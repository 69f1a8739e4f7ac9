"""Run servers and a router as one fleet: start, watch, start again, stop, leave nothing behind."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from sglang_hma.launch.asking import Watch, answers, background, is_ready, poll
from sglang_hma.launch.closed import ClosedPort
from sglang_hma.launch.console import console
from sglang_hma.launch.diagnosis import diagnose
from sglang_hma.launch.guardian import (
    KILL_TIMEOUT_S,
    Guardian,
    kill_program,
    kill_run,
    marked,
    named,
)
from sglang_hma.launch.program import Child, Program
from sglang_hma.launch.restarts import RestartPolicy, Restarts

GRACE_S = 15.0
ROUTER_GRACE_S = 5.0
TICK_S = 0.1
REASON_CHARS = 200
# One Ctrl-C may arrive twice, from the terminal and from a wrapper that forwards it.
SAME_SIGNAL_S = 0.5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROLL_SIGNAL = signal.SIGUSR1
# Between two SIGTERMs to a server: the second says that no router need be told.
AGAIN_S = 0.5


class FleetError(Exception):
    """Why a fleet cannot go on, in one line."""


class _StopRequestedError(Exception):
    pass


class Fleet:
    """Servers, then a router, then a first request; all of them until one dies too often or we are
    told.

    `first_request` runs on a thread once everything is healthy; it returns a shell line that
    sends it again, a FleetError from it ends the fleet. From then on what dies is started again,
    as `restarts` allows, with its command and so its ports; so is what neither answers nor computes
    for `hang_timeout` seconds. What has ended as it was asked to (SIGTERM) starts again, too, and
    that counts as no death; on ROLL_SIGNAL each server is asked, one after the other. Told to stop,
    the router has `drain_timeout` seconds for the requests that run, while `address` answers new
    ones with 503. The log of each program is `log_dir`/NAME.log; `verbose` prints it too.
    """

    def __init__(
        self,
        servers: Sequence[Program],
        router: Program,
        first_request: Callable[[], str],
        *,
        url: str,
        address: tuple[str, int],
        run_id: str,
        timeout: float,
        log_dir: Path,
        restarts: RestartPolicy,
        drain_timeout: float,
        hang_timeout: float,
        verbose: bool = False,
        grace: float = GRACE_S,
    ) -> None:
        self._servers, self._router, self._first_request = servers, router, first_request
        self._url, self._address, self._run_id, self._log_dir = url, address, run_id, log_dir
        self._timeout, self._verbose, self._grace = timeout, verbose, grace
        self._drain_timeout, self._hang_timeout = drain_timeout, hang_timeout
        self._console = console(sys.stdout, sys.stderr)
        self._children: dict[str, Child] = {}
        self._restarts = {each.name: Restarts(restarts) for each in (*servers, router)}
        self._due: dict[str, float] = {}  # when the dead start again
        self._returning: dict[str, tuple[float, Future[bool]]] = {}  # since when, until ready
        self._watches: dict[str, Watch] = {}
        self._guardian: Guardian | None = None
        self._serving = False
        self._signals: list[tuple[float, int]] = []
        self._to_roll: deque[str] = deque()  # servers that are still to be restarted
        self._rolled: Child | None = None  # the last that was asked to

    def run(self) -> int:
        """Exit code: 0 after a requested stop, 1 if something ended or failed by itself."""
        self._catch_signals()
        code, last_words = 0, ""
        try:
            self._guardian = Guardian(self._run_id)
            self._begin()
            self._serving = True
            self._watches = {name: Watch(child) for name, child in self._children.items()}
            while True:
                self._tick()
        except _StopRequestedError:
            drains = f": requests that run have {self._drain_timeout:g} s" if self._serving else ""
            self._console.line(f"sglang-hma stopping{drains}; a second Ctrl-C kills")
            last_words = f"sglang-hma stopped on {signal.Signals(self._signals[0][1]).name}"
        except FleetError as error:
            code, last_words = 1, f"sglang_hma.launch_pd: error: {error}"
        finally:
            self._stop()
        (self._console.error if code else self._console.line)(last_words)
        # Python's exit takes a moment, in which a signal would change the exit code.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._console.finish()
        return code

    def _begin(self) -> None:
        self._start(self._servers)
        names = ", ".join(program.name for program in self._servers)
        self._wait(f"starting {names}", self._each(answers))
        # The router looks at its servers every few seconds: the sooner they answer, the better.
        self._start([self._router])
        self._wait("connecting the router", self._each(is_ready))
        first = background(self._first_request)
        self._wait("waiting for a first answer", {"the first answer": first})
        self._announce(first.result())

    def _announce(self, curl: str) -> None:
        names = ",".join(self._children)
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

        signal.signal(ROLL_SIGNAL, self._on_roll)

    def _on_roll(self, number: int, frame: FrameType | None) -> None:
        if self._serving and not self._to_roll:
            self._to_roll.extend(program.name for program in self._servers)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signals or now > self._signals[-1][0] + SAME_SIGNAL_S:
            self._signals.append((now, number))

    def _start(self, programs: Sequence[Program]) -> None:
        show = self._console.line if self._verbose else None
        for program in programs:
            env = os.environ | marked(self._run_id) | named(self._run_id, program.name)
            self._children[program.name] = Child(program, env, self._log_dir, show)

    def _each(self, test: Callable[[int], bool]) -> dict[str, Future[bool]]:
        """By name of each child: done when the status that its ready_url answers passes `test`."""
        return {
            name: background(partial(poll, child, test)) for name, child in self._children.items()
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
        for child in self._children.values():
            if child.name in names:
                at.setdefault(child.stage, []).append(child.name)
        return "; ".join(f"{', '.join(same)}: {stage}" for stage, same in at.items())

    def _tick(self) -> None:
        time.sleep(TICK_S)
        if self._signals:
            raise _StopRequestedError
        for name, child in list(self._children.items()):
            if name in self._due:
                if time.monotonic() >= self._due[name]:
                    self._start_again(child.program)
            elif not child.alive():
                self._bury(child)
            elif name in self._returning:
                self._await_return(child)
            elif self._serving and self._watches[name].silent_s > self._hang_timeout:
                self._kill(child, f"neither answers nor computes for {self._hang_timeout:g} s")
        if self._to_roll and not (self._due or self._returning or self._leaving):
            self._roll(self._children[self._to_roll.popleft()])
        if self._guardian and not self._guardian.alive():
            self._console.line("sglang-hma: the guardian process was killed; started again")
            self._guardian = Guardian(self._run_id)

    def _roll(self, child: Child) -> None:
        """Ask it to end; `_bury` starts it again, and the next one's turn comes when it serves."""
        self._console.line(f"sglang-hma: {child.name} restarts, as asked")
        self._rolled = child
        child.popen.terminate()

    @property
    def _leaving(self) -> bool:
        return self._rolled is not None and self._rolled.alive()

    def _bury(self, child: Child) -> None:
        """Plan the start of a successor. Raises FleetError if there may be none."""
        child.drain()
        if not self._serving:
            raise FleetError(self._obituary(child))
        served = self._returning.pop(child.name, None) is None
        if served and child.popen.returncode == 0:
            self._console.line(f"sglang-hma: {child.name} has ended as it was asked; starts again")
            kill_program(self._run_id, child.name)
            self._due[child.name] = time.monotonic()
            return
        restarts = self._restarts[child.name]
        delay, how = restarts.died(), child.end() + self._reason(child)
        if delay is None:
            no_more = f" after {restarts}" if restarts.any else ""
            raise FleetError(f"{child.name} {how}, so all stopped{no_more}; log: {child.log}")
        self._console.line(
            f"sglang-hma: {child.name} {how}; starts again in {delay:g} s ({restarts}); "
            f"log: {child.log}"
        )
        kill_program(self._run_id, child.name)  # what it has left may hold its ports
        self._due[child.name] = time.monotonic() + delay

    def _start_again(self, program: Program) -> None:
        del self._due[program.name]
        self._start([program])
        ready = background(partial(poll, self._children[program.name], is_ready))
        self._returning[program.name] = time.monotonic(), ready

    def _await_return(self, child: Child) -> None:
        since, ready = self._returning[child.name]
        seconds = time.monotonic() - since
        if ready.done() and ready.result():
            del self._returning[child.name]
            self._watches[child.name] = Watch(child)
            self._console.line(f"sglang-hma: {child.name} serves again ({seconds:.0f} s)")
        elif seconds > self._timeout:
            self._kill(child, f"is not ready after {seconds:.0f} s")

    def _kill(self, child: Child, why: str) -> None:
        self._console.line(f"sglang-hma: {child.name} {why}: killed")
        kill_program(self._run_id, child.name)
        child.stop(KILL_TIMEOUT_S)

    def _reason(self, child: Child) -> str:
        """A few words in brackets, if its log has some."""
        found = diagnose(list(child.tail), child.killed)
        return f" ({found.words[0].strip()[:REASON_CHARS]})" if found.explained else ""

    def _obituary(self, child: Child) -> str:
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
        asked = len(self._signals)
        drain = self._drain_timeout if self._serving and asked else ROUTER_GRACE_S
        routers = [child for child in self._children.values() if child.program is self._router]
        servers = [child for child in self._children.values() if child.program is not self._router]
        until = time.monotonic() + drain
        closed = ClosedPort(*self._address, lambda: until - time.monotonic())
        for group, grace in ((routers, drain), (servers, self._grace)):
            until = time.monotonic() + grace
            again = [time.monotonic() + AGAIN_S] if group is servers else []
            for child in group:
                child.popen.terminate()
            while any(child.alive() for child in group) and time.monotonic() < until:
                if len(self._signals) > asked:
                    break
                if again and time.monotonic() > again[0]:
                    again.clear()
                    for child in group:
                        child.popen.terminate()
                if self._serving and asked:
                    closed.try_to_open()
                time.sleep(TICK_S / 2)
        if len(self._signals) > asked:
            self._console.line("sglang-hma killing what is left")
        if self._guardian:
            self._guardian.close()
        kill_run(self._run_id)
        for child in self._children.values():
            child.stop(KILL_TIMEOUT_S)
        closed.close()
