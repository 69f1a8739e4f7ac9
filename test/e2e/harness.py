"""Real servers and a real router for the end-to-end tests.

Nothing here gives up after a time of its own: pytest's timeout ends a hang, on any machine.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from sglang_hma.launch.defaults import ROUTER_DEFAULTS
from sglang_hma.launch.guardian import marked
from sglang_hma.launch_pd import Commands

from ..launch.fleet import MARK, kill_carrying

# Not those that the kernel gives to outgoing connections: a server binds its port half a minute
# after it was chosen. Nor those that Mooncake, launch_pd and SGLang pick from.
PORTS = range(10100, 14900)
_handed_out: set[int] = set()
POLL_S = 0.1
# How long a request may wait, and how long a server may take to say that it is healthy, are no
# matter of the machine that runs the tests.
PATIENCE = {
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "3600",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "3600",
}
PATIENT_ROUTER = ("--health-check-timeout-secs", "600", "--request-timeout-secs", "3600")
TRACEBACK = "Traceback (most recent call last):"
TRACEBACK_LINES = 40
LAST_LINES = 12
ANSWER_S = 60  # a server that is alive answers a question about itself sooner, or is asked again


def free_port() -> int:
    """A port that is free now, none handed out twice."""
    while True:
        port = random.choice(PORTS)
        if port in _handed_out:
            continue
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            _handed_out.add(port)
            return port


def until(condition: Callable[[], Any], *alive: "Process") -> Any:
    """What `condition` returns once it is true, as long as the processes `alive` are."""
    while not (found := condition()):
        for process in alive:
            process.check_alive()
        time.sleep(POLL_S)
    return found


@dataclass
class Process:
    """A child process tree with a log file."""

    name: str
    command: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)

    started = []  # all that a test may want to show the logs of

    def start(self) -> "Process":
        self.run_id = uuid.uuid4().hex
        # A launcher marks what it starts with an id of its own; MARK stays as it is.
        own = {"SGLANG_HMA_SHARE": "3", MARK: self.run_id}
        env = os.environ | own | PATIENCE | self.env | marked(self.run_id)
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        if self not in Process.started:
            Process.started.append(self)
        return self

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_logged(self, words: str) -> None:
        until(lambda: words in self.text(), self)

    def alive(self) -> bool:
        return self.popen.poll() is None

    def check_alive(self) -> None:
        assert self.alive(), f"{self.name} ended by itself, exit code {self.popen.returncode}"

    def last_words(self) -> str:
        """Its exit code, the first traceback of its log, and the end of it."""
        lines = [line for line in self.text().splitlines() if '"GET /' not in line]
        start = next((i for i, line in enumerate(lines) if line.endswith(TRACEBACK)), len(lines))
        shown = [*lines[start : start + TRACEBACK_LINES], "...", *lines[-LAST_LINES:]]
        text = "\n".join(shown)
        return f"exit code {self.popen.poll()}\n{text}"

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.popen.pid)
        return [root, *root.children(recursive=True)]

    def kill(self) -> None:
        """kill -9 of all its processes."""
        for process in self.tree():
            process.send_signal(signal.SIGKILL)
        self.popen.wait()

    def stop(self) -> None:
        """End exactly the processes that carry this run's mark."""
        kill_carrying(self.run_id)
        self.popen.wait()


@dataclass
class Server(Process):
    url: str = ""
    bootstrap_port: int = 0
    ready_path: str = "/health"

    def wait_healthy(self) -> "Server":
        until(self._healthy, self)
        return self

    def _healthy(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(self.url + self.ready_path, timeout=ANSWER_S).status_code == 200
        return False

    def info(self) -> dict[str, Any]:
        return dict(requests.get(f"{self.url}/get_server_info").json())

    def metrics(self, name: str) -> dict[str, float]:
        """Samples of one Prometheus metric, label string -> value."""
        found = {}
        for line in requests.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(name) and line[len(name)] in "{ ":
                labels, _, value = line[len(name) :].rpartition(" ")
                found[labels] = float(value)
        return found

    def metric(self, name: str) -> float:
        """The sum of one metric's samples."""
        return sum(self.metrics(name).values())


def launch(
    name: str,
    model: Path,
    logs: Path,
    *flags: str,
    mode: str = "null",
    module: str = "sglang_hma.launch_server",
    env: dict[str, str] | None = None,
) -> Server:
    """Start one server; returns before it is healthy."""
    port, bootstrap = free_port(), free_port()
    command = [sys.executable, "-m", module, "--model-path", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disaggregation-mode", mode]
    if mode == "prefill":
        command += ["--disaggregation-bootstrap-port", str(bootstrap)]
    server = Server(
        name,
        [*command, *flags],
        logs / f"{name}.log",
        env=env or {},
        url=f"http://127.0.0.1:{port}",
        bootstrap_port=bootstrap,
    )
    server.start()
    return server


def launch_router(
    logs: Path,
    prefill: Server,
    decode: Server,
    name: str = "router",
    more: Sequence[str] = (),
    entry: bool = True,
) -> Server:
    """Without `entry` SGLang's own router alone, which servers of stock SGLang want."""
    port = free_port()
    bare = (sys.executable, "-m", "sglang_router.launch_router")
    command = [*(Commands().router if entry else bare), "--pd-disaggregation"]
    command += ["--policy", "random", *ROUTER_DEFAULTS, *PATIENT_ROUTER]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    command += ["--prefill", prefill.url, str(prefill.bootstrap_port), "--decode", decode.url]
    command += more
    router = Server(
        name,
        command,
        logs / f"{name}.log",
        url=f"http://127.0.0.1:{port}",
        ready_path="/readiness",  # healthy comes earlier, with no worker to route to
    )
    router.start()
    return router


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Wait until all are healthy; stop them at the end, whatever happens."""
    try:
        for server in servers:
            server.wait_healthy()
        yield
    finally:
        for server in reversed(servers):
            server.stop()


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode server behind a router."""

    prefill: Server
    decode: Server
    router: Server

    @property
    def url(self) -> str:
        return self.router.url


@contextlib.contextmanager
def running_behind(prefill: Server, decodes: dict[str, Server]) -> Iterator[dict[str, Pair]]:
    """A pair for each of the decode servers, by its name, with the one prefill server."""
    with running(prefill, *decodes.values()):
        routers = {
            name: launch_router(prefill.log.parent, prefill, decode, f"{decode.name}-router")
            for name, decode in decodes.items()
        }
        with running(*routers.values()):
            yield {name: Pair(prefill, decodes[name], routers[name]) for name in decodes}


@contextlib.contextmanager
def running_pair(
    model: Path,
    logs: Path,
    *flags: str,
    prefill_flags: tuple[str, ...] = (),
    decode_flags: tuple[str, ...] = (),
    name: str = "pd",
    env: dict[str, str] | None = None,
) -> Iterator[Pair]:
    sides = {"prefill": (*flags, *prefill_flags), "decode": (*flags, *decode_flags)}
    prefill, decode = (
        launch(f"{name}-{mode}", model, logs, *given, mode=mode, env=env)
        for mode, given in sides.items()
    )
    with running(prefill, decode):
        router = launch_router(logs, prefill, decode, f"{name}-router")
        with running(router):
            yield Pair(prefill, decode, router)
