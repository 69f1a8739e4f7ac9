"""TCP connections of this network namespace and what is queued on them, as the kernel lists them.

Rows of /proc/thread-self/net/tcp and tcp6 (proc_net_tcp.rst of Linux's documentation): addresses
are words in host byte order, `tx_queue` counts bytes that the peer has not acknowledged (a FIN is
one), `rx_queue` bytes that no process has read, inode 0 is a socket that no process holds.
"""

import contextlib
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIN_WAIT1, TIME_WAIT, LAST_ACK, LISTEN, CLOSING = 0x04, 0x06, 0x09, 0x0A, 0x0B
TABLES = (Path("/proc/thread-self/net/tcp"), Path("/proc/thread-self/net/tcp6"))

Endpoint = tuple[str, int]  # IP address, port
Key = tuple[Endpoint, Endpoint]


@dataclass(frozen=True, slots=True)
class Connection:
    """`unacked` and `unread` are bytes; `inode` is 0 if no process holds this end."""

    local: Endpoint
    remote: Endpoint
    state: int
    unacked: int
    unread: int
    inode: int

    @property
    def key(self) -> Key:
        return self.local, self.remote

    @property
    def listening(self) -> bool:
        return self.state == LISTEN

    @property
    def sending(self) -> bool:
        """Whether the kernel still has bytes for the peer, or a FIN that is not acknowledged."""
        return self.state != TIME_WAIT and (
            self.unacked > 0 or self.state in (FIN_WAIT1, LAST_ACK, CLOSING)
        )


def connections() -> list[Connection]:
    """All rows, listening sockets too. Empty where there is no such table."""
    found = []
    for table in TABLES:
        with contextlib.suppress(FileNotFoundError):
            found += [row(line) for line in table.read_text().splitlines()[1:]]
    return found


def row(line: str) -> Connection:
    """One line of a table."""
    _, local, remote, state, queues, _, _, _, _, inode, *_ = line.split()
    unacked, unread = (int(part, 16) for part in queues.split(":"))
    listening = int(state, 16) == LISTEN
    return Connection(
        _endpoint(local),
        _endpoint(remote),
        int(state, 16),
        # Of a listening socket these are its backlog.
        0 if listening else unacked,
        0 if listening else unread,
        int(inode),
    )


def _endpoint(text: str) -> Endpoint:
    words, port = text.split(":")
    raw = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    return plain(ipaddress.ip_address(raw)), int(port, 16)


def plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """An IPv4 address as such where it is written as IPv6."""
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def addresses_of(host: str) -> set[str]:
    """The IP addresses of a host; empty if its name cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {plain(ipaddress.ip_address(str(info[4][0]).partition("%")[0])) for info in found}


def listening() -> Iterator[socket.socket]:
    """This process's TCP sockets that listen; duplicates, closed when the next one is asked for."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it has been closed meanwhile
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    if _listens(sock):
                        yield sock


def _listens(sock: socket.socket) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return False
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def own_ports(low: int, high: int) -> set[int]:
    """Ports of this range on which this process listens."""
    ports = {int(sock.getsockname()[1]) for sock in listening()}
    return {port for port in ports if low <= port <= high}
