"""Whether a peer's process has ended."""

import socket
import threading
import time

Address = tuple[str, int]

REFUSALS = 3
INTERVAL_S = 1.0
FORGET_S = 30.0

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
            for address in addresses:
                refusals = self._refusals.get(address, 0) + 1 if refuses(address) else 0
                with self._lock:
                    self._refusals[address] = refusals
            time.sleep(INTERVAL_S)


def refuses(address: Address) -> bool:
    """Whether the peer's own system says that nothing listens there.

    A firewall that rejects connections looks alike but for its ICMP message: the process behind it
    may live.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.settimeout(1)
            sock.setsockopt(*RECEIVE_ERRORS[family], 1)
            try:
                sock.connect(place)
            except ConnectionRefusedError:
                return not _has_icmp_error(sock)
    except (OSError, ValueError):  # a host name may be one that cannot be encoded
        return False
    return False


def _has_icmp_error(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        _, found, _, _ = sock.recvmsg(512, 512, socket.MSG_ERRQUEUE)
    except OSError:
        return False
    # struct sock_extended_err: its fifth byte is the origin.
    return any(data[4] in ICMP_ORIGINS for *_, data in found if len(data) > 4)
