"""The kernel's table of connections, read beside sockets that are there."""

import os
import socket
import time
from collections.abc import Iterator

import pytest

from sglang_hma.transfer.tcp_table import (
    FIN_WAIT1,
    Connection,
    addresses_of,
    connections,
    own_ports,
)

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """(client, server) of one connection; the last kind is how Mooncake takes IPv4."""
    family = socket.AF_INET if request.param == "127.0.0.1" else socket.AF_INET6
    try:
        listener = socket.create_server(
            (request.param.removeprefix("::ffff:") if "ffff" not in request.param else "::", 0),
            family=family,
            dualstack_ipv6="ffff" in request.param,
        )
    except (OSError, ValueError) as error:
        pytest.skip(f"no IPv6 here: {error}")
    host = "127.0.0.1" if "ffff" in request.param else request.param
    with listener, socket.create_connection((host, listener.getsockname()[1])) as client:
        server, _ = listener.accept()
        with server:
            yield client, server


def ends(pair: Pair) -> dict[str, tuple[str, int]]:
    client, _ = pair
    address = client.getsockname()[0], client.getsockname()[1]
    peer = client.getpeername()[0], client.getpeername()[1]
    return {"client": address, "server": peer}


def find(local: tuple[str, int], remote: tuple[str, int]) -> Connection:
    (found,) = [each for each in connections() if each.key == (local, remote)]
    return found


def test_what_nobody_has_read_and_what_nobody_has_acknowledged(pair: Pair) -> None:
    client, server = pair
    at = ends(pair)
    client.sendall(bytes(1000))
    row = find(at["server"], at["client"])
    assert row.unread == 1000 and row.inode == os.fstat(server.fileno()).st_ino and not row.sending
    server.recv(1000)
    assert find(at["server"], at["client"]).unread == 0
    assert not find(at["client"], at["server"]).sending


def test_a_closed_connection_that_still_sends(pair: Pair) -> None:
    """The reader takes nothing, so the kernel keeps the rest for it after the writer has closed."""
    client, server = pair
    at = ends(pair)
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            client.send(bytes(1 << 20))
    client.close()
    orphan = find(at["client"], at["server"])
    assert orphan.inode == 0 and orphan.state == FIN_WAIT1 and orphan.sending
    while server.recv(1 << 20):
        pass
    # The kernel acknowledges the end when it comes to it; pytest's timeout ends a hang.
    key = at["client"], at["server"]
    while any(each.sending for each in connections() if each.key == key):
        time.sleep(0.01)


def test_ports_that_this_process_listens_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert own_ports(port, port) == {port}
        assert own_ports(port + 1, 65535).isdisjoint({port})
    assert own_ports(port, port) == set()


def test_addresses_of_a_host() -> None:
    assert addresses_of("::ffff:10.1.2.3") == {"10.1.2.3"} == addresses_of("10.1.2.3")
    assert "127.0.0.1" in addresses_of("localhost")
    assert addresses_of("no.such.host.invalid") == set()
