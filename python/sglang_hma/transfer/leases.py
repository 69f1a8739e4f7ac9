"""Which decode server has the other half of a request, and whether it still wants it.

A request may wait long for pages on decode before SGLang's own message comes, and SGLang says
nothing to prefill when decode gives such a request up. So decode claims each request when it
arrives, and repeats every RENEW_S the list of those that it still has. The list is the whole
truth each time: a lost message costs a period, not a request.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection

from sglang_hma.transfer.liveness import Address, Obituaries
from sglang_hma.transfer.messages import MAX_ROOMS

logger = logging.getLogger(__name__)

RENEW_S = 3.0
LAST_WORDS_S = 30.0  # how long an empty list is repeated


class Tenant:
    """On decode: claims requests at prefill ranks and renews them until they end here.

    `claim` and `renew` send to one rank; what they are called with arrives in order.
    """

    def __init__(
        self,
        claim: Callable[[Address, int], None],
        renew: Callable[[Address, list[int]], None],
    ) -> None:
        self._claim = claim
        self._renew = renew
        self._rooms: dict[Address, set[int]] = {}
        self._used_s: dict[Address, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def take(self, room: int, ranks: Collection[Address]) -> None:
        # Under the lock: a list without this room must not overtake its claim.
        with self._lock:
            for rank in ranks:
                self._rooms.setdefault(rank, set()).add(room)
                self._claim(rank, room)
            if self._thread is None and ranks:
                self._thread = threading.Thread(target=self._run, name="hma-leases", daemon=True)
                self._thread.start()

    def drop(self, room: int) -> None:
        with self._lock:
            for rooms in self._rooms.values():
                rooms.discard(room)

    def _run(self) -> None:
        while True:
            time.sleep(RENEW_S)
            try:
                if not self._renew_all():
                    return
            except Exception:
                logger.exception("Renewing the claims failed once")

    def _renew_all(self) -> bool:
        """Send every list; False, and the thread ends, when nobody needs one any more."""
        with self._lock:
            now = time.monotonic()
            for rank, rooms in list(self._rooms.items()):
                if rooms:
                    self._used_s[rank] = now
                elif now - self._used_s.setdefault(rank, now) > LAST_WORDS_S:
                    del self._rooms[rank], self._used_s[rank]
                    continue
                self._renew(rank, sorted(rooms)[:MAX_ROOMS])
            if not self._rooms:
                self._thread = None
            return bool(self._rooms)


class Claims:
    """On prefill: who has claimed each open request, and which of them are hopeless.

    The router gives each server its half and may lose one. A request that nobody has claimed for
    UNCLAIMED_S never reached a decode server, or reached one that died at once; where every decode
    server that was ever heard of is gone, ORPHANED_S is enough. One that was claimed UNOPENED_S ago
    and has not come here never will. A decode server that has not been heard of for LEASE_S is cut
    off.
    """

    UNCLAIMED_S = 45.0
    ORPHANED_S = 10.0
    UNOPENED_S = 45.0
    LEASE_S = 30.0

    def __init__(self, *, expected: bool) -> None:
        self.expected = expected  # False with stock decode servers, which claim nothing
        self._opened: dict[int, float] = {}
        self._by: dict[int, dict[Address, bool]] = {}  # whether it still wants the request
        self._claimed_s: dict[int, float] = {}
        self._heard_s: dict[Address, float] = {}
        self._obituaries = Obituaries()

    def opened(self, room: int) -> None:
        self._opened[room] = time.monotonic()

    def closed(self, room: int) -> None:
        self._opened.pop(room, None)
        self._forget(room)

    def claimed(self, room: int, address: Address) -> None:
        """May come before `opened`: the router tells both servers at once."""
        self._heard_s[address] = time.monotonic()
        self._claimed_s.setdefault(room, time.monotonic())
        self._by.setdefault(room, {})[address] = True
        while len(self._by) > MAX_ROOMS:  # claims of requests that never came here
            self._forget(next(iter(self._by)))

    def renewed(self, rooms: Collection[int], address: Address) -> None:
        """All that a decode server still has at this rank."""
        self._heard_s[address] = time.monotonic()
        kept = set(rooms)
        for room, tenants in list(self._by.items()):
            if address in tenants:
                tenants[address] = room in kept

    def hopeless(self) -> list[tuple[int, str]]:
        """(room, why) of each open request whose decode server cannot answer any more."""
        found = []
        for room, since in list(self._opened.items()):
            tenants = self._by.get(room, {})
            reason = next(filter(None, (self._lost(*tenant) for tenant in tenants.items())), None)
            if self.expected and not tenants:
                reason = self._unclaimed(time.monotonic() - since)
            if reason is not None:
                found.append((room, reason))
        return found

    def unopened(self) -> list[tuple[int, list[Address]]]:
        """(room, decode ranks that want it) of requests whose other half never came here; again
        after a while if they still want it."""
        found = []
        now = time.monotonic()
        for room, tenants in list(self._by.items()):
            if room in self._opened or now - self._claimed_s.get(room, now) <= self.UNOPENED_S:
                continue
            if wanting := [address for address, wanted in tenants.items() if wanted]:
                self._claimed_s[room] = now
                found.append((room, wanting))
            else:
                self._forget(room)
        return found

    def _forget(self, room: int) -> None:
        self._by.pop(room, None)
        self._claimed_s.pop(room, None)

    def _unclaimed(self, waited_s: float) -> str | None:
        if waited_s > self.UNCLAIMED_S:
            return f"no decode server claimed it for {self.UNCLAIMED_S:g} s"
        if waited_s > self.ORPHANED_S and self._heard_s:
            gone = [self._obituaries.gone(address) for address in list(self._heard_s)]
            if all(gone):
                return "no decode server claimed it, and all that were known are gone"
        return None

    def _lost(self, address: Address, wanted: bool) -> str | None:
        server = f"its decode server {address[0]}:{address[1]}"
        if not wanted:
            return f"{server} has given it up"
        if self._obituaries.gone(address):
            return f"{server} is gone"
        if time.monotonic() - self._heard_s.get(address, 0.0) > self.LEASE_S:
            return f"{server} has not been heard of for {self.LEASE_S:g} s"
        return None
