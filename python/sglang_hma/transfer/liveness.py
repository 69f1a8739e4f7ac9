"""Whether a peer's process has ended."""

import contextlib
import errno
import selectors
import socket
import threading
import time
from collections.abc import Sequence

Address = tuple[str, int]

REFUSALS = 3
INTERVAL_S = 1.0
FORGET_S = 30.0
CONNECT_S = 1.0
# Connections at once, and addresses that are watched: they may come from anybody.
AT_ONCE = 128
MAX_ADDRESSES = 1024

# linux/in.h, linux/in6.h: IP_RECVERR, IPV6_RECVERR; linux/errqueue.h: SO_EE_ORIGIN_ICMP, _ICMP6.
RECEIVE_ERRORS = {
    socket.AF_INET: (socket.IPPROTO_IP, 11),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 25),
}
ICMP_ORIGINS = (2, 3)


class PeerLiveness:
    """Connects to the control ports of peers, as long as somebody asks about them.

    A peer is gone when its port has refused REFUSALS connections in a row, a second apart: no
    process listens there any more. A peer that does not answer, or which a firewall hides, is not
    gone. It may be stopped or cut off, and its writes may still arrive.
    """

    def __init__(self) -> None:
        self._refusals: dict[Address, int] = {}
        self._asked_s: dict[Address, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def is_gone(self, address: Address) -> bool:
        """Does not block. False until enough connections were tried after the first question."""
        with self._lock:
            if address not in self._asked_s and len(self._asked_s) >= MAX_ADDRESSES:
                return False
            self._asked_s[address] = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
            return self._refusals.get(address, 0) >= REFUSALS

    def _watch(self) -> None:
        while True:
            with self._lock:
                recent = time.monotonic() - FORGET_S
                self._asked_s = {a: t for a, t in self._asked_s.items() if t > recent}
                if not self._asked_s:
                    self._refusals.clear()
                    self._thread = None
                    return
                addresses = list(self._asked_s)
            refused = refusing(addresses)
            with self._lock:
                self._refusals = {
                    address: self._refusals.get(address, 0) + 1 for address in refused
                }
            time.sleep(INTERVAL_S)


def refuses(address: Address, timeout_s: float = CONNECT_S) -> bool:
    """Whether the peer's own system says that nothing listens there; False if that cannot be told
    within `timeout_s`."""
    return address in refusing([address], timeout_s)


def refusing(addresses: Sequence[Address], timeout_s: float = CONNECT_S) -> set[Address]:
    """Those at which nothing listens, as their own systems say.

    A firewall that rejects connections looks alike but for its ICMP message: the process behind it
    may live. Connects to AT_ONCE together, so that silent ones hold up the others for `timeout_s`
    and no longer.
    """
    starts = range(0, len(addresses), AT_ONCE)
    return set().union(*(_refusing(addresses[i : i + AT_ONCE], timeout_s) for i in starts))


def _refusing(addresses: Sequence[Address], timeout_s: float) -> set[Address]:
    found = set()
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for address in addresses:
            # No such name, no such network; a name may be one that cannot be encoded.
            with contextlib.suppress(OSError, ValueError):
                connection, code = _connect(address, stack)
                if code == errno.ECONNREFUSED and not _has_icmp_error(connection):
                    found.add(address)
                elif code == errno.EINPROGRESS:
                    selector.register(connection, selectors.EVENT_WRITE, (address, connection))
        deadline = time.monotonic() + timeout_s
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                address, connection = key.data
                code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == errno.ECONNREFUSED and not _has_icmp_error(connection):
                    found.add(address)
                selector.unregister(connection)
    return found


def _connect(address: Address, stack: contextlib.ExitStack) -> tuple[socket.socket, int]:
    """A socket that has begun to connect, and what that gave."""
    host, port = address[0].removeprefix("[").removesuffix("]"), address[1]
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    connection = stack.enter_context(socket.socket(family, kind, protocol))
    connection.setblocking(False)
    connection.setsockopt(*RECEIVE_ERRORS[family], 1)
    return connection, connection.connect_ex(place)


def _has_icmp_error(connection: socket.socket) -> bool:
    try:
        _, found, _, _ = connection.recvmsg(512, 512, socket.MSG_ERRQUEUE)
    except OSError:
        return False
    # struct sock_extended_err: its fifth byte is the origin.
    return any(data[4] in ICMP_ORIGINS for *_, data in found if len(data) > 4)
