"""The entry and its router end together."""

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import requests

from sglang_hma.launch_pd import Commands
from test.e2e.harness import Server, free_port


@pytest.fixture
def entry(tmp_path: Path) -> Server:
    """With a router that has no servers."""
    port = free_port()
    command = [*Commands().router, "--pd-disaggregation", "--policy", "random"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    command += ["--prefill", "http://127.0.0.1:9", "9", "--decode", "http://127.0.0.1:9"]
    url = f"http://127.0.0.1:{port}"
    return Server("entry", command, tmp_path / "log", url=url, ready_path="/liveness")


def gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def ended(processes: list[psutil.Process]) -> None:
    while not all(map(gone, processes)):
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_router_ends_with_the_entry(entry: Server, number: signal.Signals) -> None:
    entry.start()
    try:
        entry.wait_healthy()
        tree = entry.tree()
        assert len(tree) == 2
        os.kill(entry.popen.pid, number)
        ended(tree)
        assert entry.popen.wait() == (-number if number == signal.SIGKILL else 0)
        assert "Traceback" not in entry.text()
    finally:
        entry.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGALRM])
def test_the_entry_ends_as_the_router_does(entry: Server, number: signal.Signals) -> None:
    entry.start()
    try:
        entry.wait_healthy()
        _, router = tree = entry.tree()
        router.send_signal(number)
        ended(tree)
        assert entry.popen.wait() == -number
        assert "Traceback" not in entry.text()
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{entry.url}/liveness")
    finally:
        entry.stop()


def test_a_port_that_is_taken(entry: Server) -> None:
    entry.start()
    try:
        entry.wait_healthy()
        second = Server("second", entry.command, entry.log.with_name("second"))
        second.start()
        try:
            assert second.popen.wait() == 1
            assert "address already in use" in second.text()
        finally:
            second.stop()
    finally:
        entry.stop()
