"""Real sockets that listen on every interface; 127.0.0.2 and so on stand for other addresses."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sglang_hma.packet_filter import FROM, TO, Only, attach
from sglang_hma.transfer.listeners import LOOPBACK

REFUSED_AFTER_S = 0.5  # a dropped SYN gets no answer at all


def listen(family: int) -> socket.socket:
    sock = socket.socket(family)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("" if family == socket.AF_INET else "::", 0))
    sock.listen()
    return sock


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    if request.param == socket.AF_INET6 and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with listen(request.param) as sock:
        yield sock


def reaches(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(REFUSED_AFTER_S)
        try:
            sock.connect((address, port))
            sock.sendall(b"ping")
        except OSError:
            return False
    return True


def echo(listener: socket.socket, address: str) -> bytes:
    """What comes through a connection to `address`, both ways."""
    with socket.create_connection((address, listener.getsockname()[1]), timeout=600) as client:
        server, _ = listener.accept()
        with server:
            server.settimeout(600)
            client.sendall(b"ping" * 50_000)
            read = b""
            while len(read) < 200_000:
                read += server.recv(1 << 20)
            server.sendall(read[:4])
            return client.recv(4)


def test_reached_at_its_address_and_loopback_alone(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert reaches("127.0.0.2", port) and reaches("127.0.0.3", port)
    while_open = listener.accept()[0], listener.accept()[0]
    attach(listener, Only(("127.0.0.3", *LOOPBACK), TO))
    assert not reaches("127.0.0.2", port)
    for address in ("127.0.0.3", "127.0.0.1"):
        assert echo(listener, address) == b"ping"
    if listener.family == socket.AF_INET6:
        assert echo(listener, "::1") == b"ping"
    for sock in while_open:
        sock.close()


def test_only_its_own_host_reaches_it(listener: socket.socket) -> None:
    """Where a connection comes from is the client's to choose on loopback alone."""
    port = listener.getsockname()[1]
    attach(listener, Only(("127.0.0.3", *LOOPBACK), FROM))
    for source, through in (("127.0.0.3", True), ("127.0.0.1", True), ("127.0.0.2", False)):
        with socket.socket() as client:
            client.bind((source, 0))
            client.settimeout(600 if through else REFUSED_AFTER_S)
            assert (client.connect_ex(("127.0.0.4", port)) == 0) == through, source


def test_an_address_of_version_six() -> None:
    with listen(socket.AF_INET6) as sock:
        attach(sock, Only(("fd00::7", *LOOPBACK), TO))
        port = sock.getsockname()[1]
        assert echo(sock, "::1") == b"ping"
        assert not reaches("127.0.0.2", port)


def test_every_listener_of_the_process_and_nothing_else() -> None:
    code = """
import os, socket
from sglang_hma.transfer import listeners
every = socket.create_server(("", 0))
dual = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
one = socket.create_server(("127.0.0.2", 0))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("", 0))
read, write = os.pipe()
found = {sock.getsockname()[1] for sock in listeners.open_to_all()}
assert found == {every.getsockname()[1], dual.getsockname()[1]}, found
before = len(os.listdir("/proc/self/fd"))
listeners.bind("127.0.0.9")
listeners.bind("127.0.0.8")  # those are bound already
assert len(os.listdir("/proc/self/fd")) == before
os.fstat(udp.fileno())
for sock, address, through in (
    (every, "127.0.0.9", True), (every, "127.0.0.2", False), (dual, "127.0.0.2", False),
    (one, "127.0.0.2", True),
):
    with socket.socket() as client:
        client.settimeout(0.5)
        assert (client.connect_ex((address, sock.getsockname()[1])) == 0) == through, address
"""
    subprocess.run([sys.executable, "-c", code], check=True)
