"""A port that refuses belongs to a process that has ended; one that is silent does not."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from sglang_hma.transfer import liveness
from sglang_hma.transfer.liveness import REFUSALS, PeerLiveness, refuses, refusing


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def refusing_address() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[:2]


def test_refusing_ports_are_gone_and_listening_ones_are_not(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "INTERVAL_S", 0.01)
    watched, dead, alive = PeerLiveness(), refusing_address(), listening.getsockname()[:2]
    assert not watched.is_gone(dead), "nothing was tried before the first question"
    assert not watched.is_gone(alive)
    listening.settimeout(60)
    for _ in range(REFUSALS + 1):  # each a connection that was tried
        listening.accept()[0].close()
        assert not watched.is_gone(alive)
    deadline = time.monotonic() + 600
    while not watched.is_gone(dead):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a\0b", "\ud800"])
def test_odd_hosts_end_no_thread(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer says of itself where it is."""
    monkeypatch.setattr(liveness, "INTERVAL_S", 0.01)
    watched, dead = PeerLiveness(), refusing_address()
    assert not watched.is_gone((host, 1))
    deadline = time.monotonic() + 600
    while not watched.is_gone(dead):
        assert time.monotonic() < deadline and not watched.is_gone((host, 1))
        time.sleep(0.001)


def test_silence_is_no_refusal() -> None:
    """As of a stopped process: its backlog is full, and nothing answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()[:2]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        assert not refuses(address)
        for one in waiting:
            one.close()
    assert refuses(refusing_address())


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or shutil.which("unshare") is None,
    reason="a network namespace and a tunnel need root, /dev/net/tun and util-linux",
)
def test_a_firewall_that_rejects_is_no_proof_of_death() -> None:
    """To a plain connect() it is ECONNREFUSED, as a closed port is."""
    command = ["unshare", "--net", sys.executable, "-m", "test.transfer.rejecting_firewall"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "looks refused, False True", done.stdout + done.stderr


def test_silent_peers_hold_up_nobody() -> None:
    """One after the other they would take three minutes."""
    began = time.monotonic()
    with socket.create_server(("0.0.0.0", 0), backlog=0) as server:
        port = server.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        silent = [(f"127.0.0.{i}", port) for i in range(2, 202)]
        dead = [refusing_address() for _ in range(3)]
        assert refusing([*silent[:100], *dead, *silent[100:]]) == set(dead)
        for one in waiting:
            one.close()
    assert time.monotonic() - began < 120


def test_addresses_that_are_none() -> None:
    assert not refusing([("300.1.1.1", 1), ("a name", 5), ("1.2.3.4", 0)])
    refuses(("[::1]", refusing_address()[1]))  # raises nothing, IPv6 or not
