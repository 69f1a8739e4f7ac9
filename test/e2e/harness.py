"""Real servers and a real router for the end-to-end tests."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from sglang_hma.launch.guardian import kill_run, marked
from sglang_hma.launch_pd import ROUTER_DEFAULTS

START_TIMEOUT_S = 240


# Not those that the kernel gives to outgoing connections: a server binds its port half a minute
# after it was chosen. Nor those that Mooncake, launch_pd and SGLang pick from.
PORTS = range(10100, 14900)
_handed_out: set[int] = set()


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


@dataclass
class Process:
    """A child process tree with a log file."""

    name: str
    command: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)

    def start(self) -> "Process":
        self.run_id = uuid.uuid4().hex
        env = os.environ | {"SGLANG_HMA_SHARE": "3"} | self.env | marked(self.run_id)
        with self.log.open("wb") as out:
            self.popen = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        return self

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def alive(self) -> bool:
        return self.popen.poll() is None

    def stop(self) -> None:
        """End exactly the processes that carry this run's id."""
        if self.alive():
            self.popen.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(3)
        kill_run(self.run_id)
        self.popen.wait(10)


@dataclass
class Server(Process):
    url: str = ""
    bootstrap_port: int = 0
    ready_path: str = "/health"

    def wait_healthy(self) -> "Server":
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self.alive():
                raise AssertionError(f"{self.name} ended early:\n{self.text()[-6000:]}")
            with contextlib.suppress(requests.RequestException):
                if requests.get(self.url + self.ready_path, timeout=2).status_code == 200:
                    return self
            time.sleep(0.3)
        raise AssertionError(f"{self.name} is not healthy:\n{self.text()[-6000:]}")

    def info(self) -> dict[str, Any]:
        return dict(requests.get(f"{self.url}/get_server_info", timeout=10).json())

    def metrics(self, name: str) -> dict[str, float]:
        """Samples of one Prometheus metric, label string -> value."""
        found = {}
        for line in requests.get(f"{self.url}/metrics", timeout=10).text.splitlines():
            if line.startswith(name) and line[len(name)] in "{ ":
                labels, _, value = line[len(name) :].rpartition(" ")
                found[labels] = float(value)
        return found


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


def launch_router(logs: Path, prefill: Server, decode: Server, name: str = "router") -> Server:
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    command += ["--policy", "random", *ROUTER_DEFAULTS, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port())]
    command += ["--prefill", prefill.url, str(prefill.bootstrap_port), "--decode", decode.url]
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


def generate(url: str, input_ids: list[int], tokens: int = 16, **extra: Any) -> dict[str, Any]:
    """One greedy request; raises on anything but HTTP 200."""
    reply = requests.post(f"{url}/generate", json=payload(input_ids, tokens, **extra), timeout=180)
    assert reply.status_code == 200, (reply.status_code, reply.text[:2000])
    return dict(reply.json())


def payload(input_ids: list[int], tokens: int = 16, **extra: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": input_ids, "sampling_params": sampling, **extra}


def output_ids(url: str, input_ids: list[int], tokens: int = 16) -> list[int]:
    return list(generate(url, input_ids, tokens)["output_ids"])
