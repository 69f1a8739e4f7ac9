"""Whether a peer's process is gone for good, and whose requests wait for one that is."""

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


class Claims:
    """On prefill: which decode server has the other half of each open request.

    A request that no decode server has claimed for UNCLAIMED_S never reached one, or
    reached one that died at once: decode claims a request when it arrives there.
    """

    UNCLAIMED_S = 45.0

    def __init__(self, *, expected: bool) -> None:
        self.expected = expected  # False with stock decode servers, which claim nothing
        self._opened: dict[int, float] = {}
        self._by: dict[int, set[Address]] = {}
        self._obituaries = Obituaries()

    def opened(self, room: int) -> None:
        self._opened[room] = time.monotonic()

    def closed(self, room: int) -> None:
        self._opened.pop(room, None)
        self._by.pop(room, None)

    def claimed(self, room: int, address: Address) -> None:
        """May come before `opened`: the router tells both servers at once."""
        self._by.setdefault(room, set()).add(address)
        while len(self._by) > 65536:  # claims of requests that never came here
            self._by.pop(next(iter(self._by)))

    def hopeless(self) -> list[tuple[int, str]]:
        """(room, why) of each open request whose decode server cannot answer any more."""
        found = []
        for room, since in list(self._opened.items()):
            addresses = self._by.get(room, set())
            dead = [address for address in addresses if self._obituaries.gone(address)]
            if dead:
                found.append((room, f"its decode server {dead[0][0]}:{dead[0][1]} is gone"))
            elif self.expected and not addresses and time.monotonic() - since > self.UNCLAIMED_S:
                found.append((room, f"no decode server claimed it for {self.UNCLAIMED_S:g} s"))
        return found
