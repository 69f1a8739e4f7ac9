"""launch_pd with real servers: one fleet, and what happens to it."""

import contextlib
import json
import random
import re
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import requests

from .client import generate, payload
from .harness import Process, free_port, until

pytestmark = [pytest.mark.e2e, pytest.mark.faults]

HANG_S = 20
REFUSED_AFTER_S = 1.0


@dataclass
class Fleet(Process):
    port: int = 0
    shared_memory: set[str] = field(default_factory=set)

    def remember_shared_memory(self) -> None:
        """Of servers that live now; some of them will be killed."""
        for process in self.tree():
            paths = {each.path for each in process.memory_maps()}
            self.shared_memory |= {path for path in paths if "/dev/shm/sglang_loads_" in path}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_said(self, words: str, times: int = 1) -> None:
        until(lambda: self.text().count(words) >= times, self)

    def process(self, role: str, title: str) -> psutil.Process:
        """Of a role's server, the process that SGLang calls so."""
        server = next(
            each for each in self.tree() if f"--disaggregation-mode {role}" in words(each)
        )
        return next(each for each in server.children() if title in words(each))

    def answers(self) -> bool:
        """Whether a request comes through, as soon as the router has found all servers again."""
        with contextlib.suppress(AssertionError):
            return bool(generate(self.url, prompt(40), 4))
        return False


def words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def prompt(tokens: int) -> list[int]:
    return [random.randrange(8, 4000) for _ in range(tokens)]


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    port = free_port()
    command = [sys.executable, "-m", "sglang_hma.launch_pd", "--model-path", str(model)]
    command += ["--port", str(port), "--log-dir", str(folder), "--dtype", "float32"]
    command += ["--max-total-tokens", "4096", "--hma-hang-timeout", str(HANG_S)]
    started = Fleet("launcher", command, folder / "out", port=port)
    started.start()
    try:
        started.wait_said("  stop: ")
        started.remember_shared_memory()
        yield started
    finally:
        started.stop()


def reaches(address: str, port: int) -> bool:
    """Neither end is 127.0.0.1, as if it came from another host, unless `address` is."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(REFUSED_AFTER_S)
        sock.bind((address, 0))
        return sock.connect_ex((address, port)) == 0


def other_addresses() -> Iterator[str]:
    """Of this host, but for 127.0.0.1 and ::1; 127.0.0.2 is one that every host has."""
    yield "127.0.0.2"
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            an_ip = each.family in (socket.AF_INET, socket.AF_INET6) and "%" not in each.address
            if an_ip and each.address not in ("127.0.0.1", "::1"):
                yield each.address


def test_no_port_is_reached_from_the_network(fleet: Fleet) -> None:
    listening = {
        (each.laddr.ip, each.laddr.port)
        for process in fleet.tree()
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }
    assert len(listening) >= 10
    everywhere = {port for address, port in listening if address in ("0.0.0.0", "::")}
    assert {address for address, _ in listening} <= {"127.0.0.1", "0.0.0.0", "::"}
    assert all(reaches("127.0.0.1", port) for port in everywhere)
    found = [(a, port) for a in other_addresses() for port in everywhere if reaches(a, port)]
    assert found == []


def test_a_killed_detokenizer(fleet: Fleet) -> None:
    victim = fleet.process("decode", "sglang::detokenizer")
    victim.kill()
    fleet.wait_said("decode-0 was killed by SIGKILL")
    by_sglang = rf"Subprocess detokenizer \(pid={victim.pid}\) crashed with exit code -9"
    by_us = rf"\S+ error: detokenizer \(process {victim.pid}\) is gone, so this server ends"
    assert re.search(rf"decode-0 was killed by SIGKILL \(({by_sglang}|{by_us})\)", fleet.text())
    log = (fleet.log.parent / "decode-0.log").read_text()
    assert "Waiting 60" not in log
    fleet.wait_said("decode-0 serves again (")
    until(fleet.answers, fleet)


def test_a_killed_router(fleet: Fleet) -> None:
    victim = next(each for each in fleet.tree() if "sglang::router" in words(each))
    victim.kill()
    fleet.wait_said("router was killed by SIGKILL; starts again in 1 s (restart 1 of 5 in 600 s)")
    fleet.wait_said("router serves again (")
    assert fleet.answers()


def test_a_stopped_scheduler(fleet: Fleet) -> None:
    victim = fleet.process("prefill", "sglang::scheduler")
    victim.suspend()
    fleet.wait_said("prefill-0 was killed by SIGKILL")
    assert re.search(
        rf"prefill-0 was killed by SIGKILL \(sglang_hma\.launch_server: error: scheduler "
        rf"\(process {victim.pid}\) is stopped since \d+ s, so this server ends\)",
        fleet.text(),
    )
    fleet.wait_said("prefill-0 serves again (")
    until(fleet.answers, fleet)


def test_a_server_that_is_asked_to_end_starts_again(fleet: Fleet) -> None:
    again = "decode-0 serves again ("
    before = fleet.text().count(again)
    detokenizer = fleet.process("decode", "sglang::detokenizer")
    detokenizer.parent().terminate()
    fleet.wait_said("decode-0 has ended as it was asked; starts again")
    log = (fleet.log.parent / "decode-0.log").read_text()
    assert "SIGTERM: this server takes requests for 10 s more" in log
    fleet.wait_said(again, before + 1)
    until(fleet.answers, fleet)


def test_sigterm_lets_requests_finish_and_leaves_nothing(fleet: Fleet) -> None:
    fleet.remember_shared_memory()
    assert len(fleet.shared_memory) >= 2
    streams = [Stream(fleet.url, tokens=100) for _ in range(12)]
    with ThreadPoolExecutor(len(streams)) as pool:
        list(pool.map(Stream.begin, streams))
        fleet.popen.send_signal(signal.SIGTERM)
        assert list(pool.map(Stream.rest, streams)) == [100] * len(streams)
    assert fleet.popen.wait() == 0
    assert not [path for path in fleet.shared_memory if Path(path).exists()]


class Stream:
    """A request whose tokens come one by one."""

    def __init__(self, url: str, tokens: int) -> None:
        self._url, self._body = f"{url}/generate", payload(prompt(200), tokens, stream=True)

    def begin(self) -> None:
        """Returns with the first tokens."""
        reply = requests.post(self._url, json=self._body, stream=True)
        assert reply.status_code == 200, reply.text
        self._lines = (line for line in reply.iter_lines() if line)
        next(self._lines)

    def rest(self) -> int:
        """How many tokens there were in the end."""
        *_, last, done = self._lines
        assert done == b"data: [DONE]"
        return len(json.loads(last.removeprefix(b"data: "))["output_ids"])
