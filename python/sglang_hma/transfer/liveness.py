"""Whether a peer's process has ended."""

import socket
import threading
import time

Address = tuple[str, int]

REFUSALS = 3
INTERVAL_S = 1.0
FORGET_S = 30.0


class PeerLiveness:
    """Connects to the control ports of peers, as long as somebody asks about them.

    A peer is gone when its port has refused REFUSALS connections in a row, a second apart: no
    process listens there any more. A peer that does not answer is not gone. It may be stopped or
    cut off, and its writes may still arrive.
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


def refuses(address: Address, timeout_s: float = 1.0) -> bool:
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
