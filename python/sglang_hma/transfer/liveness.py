"""Whether a peer's process is gone for good."""

import socket
import threading
import time

Address = tuple[str, int]

STRIKES = 3
INTERVAL_S = 1.0
FORGET_S = 30.0


class Obituaries:
    """Tries the control ports of servers that somebody asks about.

    A port that refuses STRIKES connections in a row, a second apart, belongs to
    no process any more. One that does not answer may be stopped or cut off: its
    writes may still come, so it is not gone.
    """

    def __init__(self) -> None:
        self._strikes: dict[Address, int] = {}
        self._asked: dict[Address, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def gone(self, address: Address) -> bool:
        """Never blocks; the first question starts the watch."""
        with self._lock:
            self._asked[address] = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
            return self._strikes.get(address, 0) >= STRIKES

    def _watch(self) -> None:
        while True:
            with self._lock:
                recent = time.monotonic() - FORGET_S
                self._asked = {a: t for a, t in self._asked.items() if t > recent}
                if not self._asked:
                    self._strikes.clear()
                    self._thread = None
                    return
                addresses = list(self._asked)
            for address in addresses:
                strikes = self._strikes.get(address, 0) + 1 if refuses(address) else 0
                with self._lock:
                    self._strikes[address] = strikes
            time.sleep(INTERVAL_S)


def refuses(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
