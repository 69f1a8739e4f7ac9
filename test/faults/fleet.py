"""A fleet of launch_pd as a person runs it: several servers of each role and a router."""

import contextlib
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from sglang_hma.launch.guardian import PROGRAM_ENV

from ..e2e.harness import Process, Server, free_port, until

CHUNK = 256
# Never out of restarts, always after a second: what is looked for is what a fault does, not how
# many of them launch_pd allows.
OFTEN = ("--max-restarts", "100000", "--restart-window", "1")
SERVES_AGAIN = re.compile(r"^sglang-hma: (\S+) serves again", re.MULTILINE)


@dataclass
class Fleet(Process):
    """The launcher; its programs are found in its children, whichever start of them it is."""

    port: int = 0
    logs: Path = Path()  # of its programs
    names: tuple[str, ...] = ()  # of the servers, without the router

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def main(self, name: str) -> psutil.Process | None:
        """The process that launch_pd has started for the program `name`, if it lives."""
        for child in psutil.Process(self.popen.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.environ().get(PROGRAM_ENV, "").rpartition("/")[2] == name:
                    return child
        return None

    def processes(self, name: str) -> list[psutil.Process]:
        root = self.main(name)
        if root is None:
            return []
        with contextlib.suppress(psutil.Error):
            return [root, *root.children(recursive=True)]
        return []

    def part(self, name: str, title: str) -> psutil.Process | None:
        """Of a server, the process that SGLang calls sglang::`title`."""
        for process in self.processes(name):
            with contextlib.suppress(psutil.Error):
                if f"sglang::{title}" in " ".join(process.cmdline()):
                    return process
        return None

    def server(self, name: str) -> Server:
        """To ask a server itself; it must live."""
        root = until(lambda: self.main(name), self)
        command = root.cmdline()
        port = command[command.index("--port") + 1]
        log = self.logs / f"{name}.log"
        server = Server(name, command, log, url=f"http://127.0.0.1:{port}")
        server.popen = self.popen
        return server

    def served_again(self) -> Counter[str]:
        """How often launch_pd has said that each program serves again."""
        return Counter(SERVES_AGAIN.findall(self.text()))

    def returns(self, name: str) -> int:
        return self.served_again()[name]

    def wait_return(self, name: str, before: int) -> None:
        """Until `name` serves again, after the `before` times that are past."""
        until(lambda: self.returns(name) > before, self)

    def signal(self, name: str, number: signal.Signals) -> None:
        """To all processes of a program."""
        for process in self.processes(name):
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def rss(self) -> dict[tuple[int, str], int]:
        """Bytes by process, of the servers, the router and the launcher."""
        found = {(self.popen.pid, "launcher"): psutil.Process(self.popen.pid).memory_info().rss}
        for name in (*self.names, "router"):
            for process in self.processes(name):
                with contextlib.suppress(psutil.Error):
                    words = " ".join(process.cmdline())
                    part = words.split()[0].removeprefix("sglang::") if "::" in words else "main"
                    found[process.pid, f"{name} {part}"] = process.memory_info().rss
        return found


@contextlib.contextmanager
def running(
    model: Path,
    folder: Path,
    logs: Path,
    prefill: int,
    decode: int,
    *flags: str,
    env: dict[str, str],
) -> Iterator[Fleet]:
    """Ready when it is given out; nothing of it is left afterwards."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_hma.launch_pd", "--model-path", str(model)]
    command += ["--port", str(port), "--prefill", str(prefill), "--decode", str(decode)]
    command += [
        "--log-dir",
        str(logs),
        "--dtype",
        "float32",
        "--chunked-prefill-size",
        str(CHUNK),
        "--enable-metrics",
    ]
    names = [
        f"{role}-{i}" for role, n in (("prefill", prefill), ("decode", decode)) for i in range(n)
    ]
    fleet = Fleet("launcher", [*command, *flags], folder / "out", env=env)
    fleet.port, fleet.logs, fleet.names = port, logs, tuple(names)
    fleet.start()
    try:
        fleet.wait_logged("  stop: ")
        yield fleet
    finally:
        fleet.stop()
