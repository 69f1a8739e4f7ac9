"""Causing the faults of a schedule, each on a thread of its own as long as it lasts."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .fleet import Fleet
from .schedule import Fault

FAULTY_LINK = Path(__file__).parent.parent / "stand_ins" / "faulty_link"
FLIPPED, SLOW_S = 0.02, 0.02
DISK_BYTES = 4 << 20


@dataclass
class Link:
    """The fleet's transfers, through test/stand_ins/faulty_link."""

    file: Path
    now: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(FAULTY_LINK), "HMA_TEST_FAULTS": str(self.file)}

    def change(self, name: str, value: float | None) -> None:
        with self.lock:
            self.now = {key: v for key, v in self.now.items() if key != name}
            if value is not None:
                self.now[name] = value
            new = self.file.with_suffix(".new")
            new.write_text(json.dumps(self.now))
            new.replace(self.file)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own at `folder`; whether there may be one here (root, mount(8))."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


class Injector:
    """`happened`: each fault and what was hit, in words."""

    def __init__(self, fleet: Fleet, link: Link, disk: Path) -> None:
        self._fleet, self._link, self._disk = fleet, link, disk
        self._threads: list[threading.Thread] = []
        self._held: dict[int, int] = {}  # stopped process -> how many faults stop it
        self._lock = threading.Lock()
        self.happened: list[str] = []
        self.struck: set[int] = set()  # processes that were signalled
        self.error: BaseException | None = None

    def cause(self, fault: Fault) -> None:
        thread = threading.Thread(target=self._run, args=(fault,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def finish(self) -> None:
        for thread in self._threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _run(self, fault: Fault) -> None:
        try:
            kind = fault.kind
            if kind.startswith("kill") or kind == "end-server":
                self._strike(fault)
            elif kind.startswith("stop"):
                self._stop(fault)
            elif kind == "full-disk":
                self._fill(fault)
            else:
                name, value = ("flip", FLIPPED) if kind == "flip-bytes" else ("slow_s", SLOW_S)
                self._for_a_while(fault, lambda on: self._link.change(name, value if on else None))
        except BaseException as error:
            self.error = error

    def _note(self, fault: Fault, what: str) -> None:
        self.happened.append(f"{fault}: {what}")

    def _victims(self, fault: Fault) -> list[psutil.Process]:
        name, (_, _, what) = fault.server or "router", fault.kind.partition("-")
        if what in ("scheduler", "detokenizer"):
            part = self._fleet.part(name, what)
            return [part] if part else []
        if fault.kind == "end-server":
            main = self._fleet.main(name)
            return [main] if main else []
        return self._fleet.processes(name)

    def _signal(self, victims: list[psutil.Process], number: signal.Signals) -> int:
        hit = 0
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
                self.struck.add(process.pid)
                hit += 1
        return hit

    def _strike(self, fault: Fault) -> None:
        number = signal.SIGTERM if fault.kind == "end-server" else signal.SIGKILL
        hit = self._signal(self._victims(fault), number)
        self._note(fault, f"{hit} processes" if hit else "was not there")

    def _stop(self, fault: Fault) -> None:
        victims = self._victims(fault)
        with self._lock:
            for process in victims:
                self._held[process.pid] = self._held.get(process.pid, 0) + 1
            hit = self._signal(victims, signal.SIGSTOP)
        self._note(fault, f"{hit} processes" if hit else "was not there")
        time.sleep(fault.seconds)
        with self._lock:
            for process in victims:
                self._held[process.pid] -= 1
            free = [process for process in victims if not self._held[process.pid]]
            self._signal(free, signal.SIGCONT)

    def _fill(self, fault: Fault) -> None:
        stuffing = self._disk / f"stuffing-{fault.at_s:.0f}"

        def turn(on: bool) -> None:
            if not on:
                stuffing.unlink()
                return
            with contextlib.suppress(OSError), stuffing.open("wb", buffering=0) as file:
                for size in (1 << 16, 1 << 10, 1):
                    with contextlib.suppress(OSError):
                        while file.write(b"\0" * size) == size:
                            pass
            assert os.statvfs(self._disk).f_bavail == 0

        self._for_a_while(fault, turn)

    def _for_a_while(self, fault: Fault, turn: Callable[[bool], None]) -> None:
        turn(True)
        self._note(fault, "on")
        time.sleep(fault.seconds)
        turn(False)
