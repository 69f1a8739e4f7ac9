"""Which decode server has the other half of a request, and whether it still wants it.

A request may wait on decode for pages long before SGLang tells prefill of it, and SGLang never
tells prefill that decode has given up such a request. So decode claims each request when it
arrives, and every RENEW_S sends the list of all requests that it still has. Each list is complete
in itself, and claims what it names: a lost message delays the news by one period and loses nothing.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection

from sglang_hma.transfer.early_claims import EarlyClaims
from sglang_hma.transfer.liveness import Address, PeerLiveness
from sglang_hma.transfer.messages import MAX_ROOMS

logger = logging.getLogger(__name__)

RENEW_S = 3.0
EMPTY_LISTS_S = 30.0  # how long an empty list is repeated


class ClaimRenewer:
    """On decode: claims requests at prefill ranks and renews the claims until the requests end.

    `send_claim` and `send_renewal` send to one rank; messages must arrive in the order of the
    calls.
    """

    def __init__(
        self,
        send_claim: Callable[[Address, int], None],
        send_renewal: Callable[[Address, list[int]], None],
    ) -> None:
        self._send_claim = send_claim
        self._send_renewal = send_renewal
        self._rooms: dict[Address, set[int]] = {}
        self._used_s: dict[Address, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def claim(self, room: int, ranks: Collection[Address]) -> None:
        # Sent under the lock: a list without this room must not overtake its claim.
        with self._lock:
            for rank in ranks:
                self._rooms.setdefault(rank, set()).add(room)
                self._send_claim(rank, room)
            if self._thread is None and ranks:
                self._thread = threading.Thread(target=self._run, name="hma-claims", daemon=True)
                self._thread.start()

    def drop(self, room: int) -> None:
        """The request has ended here: the next list is without it."""
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
        """Send every rank its list. False if no rank needs one any more: the thread then ends."""
        with self._lock:
            now = time.monotonic()
            for rank, rooms in list(self._rooms.items()):
                if rooms:
                    self._used_s[rank] = now
                elif now - self._used_s.setdefault(rank, now) > EMPTY_LISTS_S:
                    del self._rooms[rank], self._used_s[rank]
                    continue
                self._send_renewal(rank, sorted(rooms)[:MAX_ROOMS])
            if not self._rooms:
                self._thread = None
            return bool(self._rooms)


class Claims:
    """On prefill: which decode ranks have claimed each open request, and which requests are lost.

    The router sends each server its half of a request, and may lose either. A request that nobody
    has claimed for UNCLAIMED_S never reached a decode server, or reached one that died at once;
    ORPHANED_S is enough if every known decode server is gone, or if one was found gone less than
    LATELY_S before the request came, or since: SGLang's router waits for both servers before it
    tries a request again, so for this one. A request that was claimed UNOPENED_S
    ago and has not arrived here never will. A decode server that was not heard for LEASE_S is cut
    off.
    """

    UNCLAIMED_S = 45.0
    ORPHANED_S = 10.0
    LATELY_S = 30.0
    UNOPENED_S = 45.0
    LEASE_S = 30.0
    FORGOTTEN_S = 180.0  # a silent rank's claims of requests that never came
    MAX_CLAIMANTS = 1024  # ranks of one request, and ranks that are remembered without one
    MAX_PROBED = 64  # ranks that have claimed nothing that was here
    MAX_REFUSED = 4096

    def __init__(self, *, expected: bool) -> None:
        self.expected = expected  # False with stock decode servers, which claim nothing
        self._opened_s: dict[int, float] = {}
        # Of open requests: whether each claimant still wants it.
        self._claimants: dict[int, dict[Address, bool]] = {}
        self._early = EarlyClaims()
        self._refused: dict[int, str] = {}  # why, the oldest first
        self._heard_s: dict[Address, float] = {}  # the one heard last stands last
        self._gone_s: dict[Address, float] = {}  # of those in `_heard_s`: when that was seen
        self._liveness = PeerLiveness()
        self._lock = threading.Lock()

    def opened(self, room: int) -> None:
        """The request has arrived here."""
        with self._lock:
            self._opened_s[room] = time.monotonic()
            if claimants := self._early.take(room):
                self._claimants[room] = claimants
                for address in claimants:
                    self._early.know(address)
                    self._heard_s.setdefault(address, time.monotonic())

    def closed(self, room: int) -> None:
        """The request has ended here."""
        with self._lock:
            self._opened_s.pop(room, None)
            self._claimants.pop(room, None)
            self._early.take(room)

    def refused(self, room: int, reason: str) -> None:
        """The request has arrived here, and will not be served."""
        with self._lock:
            if room in self._opened_s:
                return  # another request has this room
            self._refused.pop(room, None)
            self._refused[room] = reason
            if len(self._refused) > self.MAX_REFUSED:
                del self._refused[next(iter(self._refused))]

    def claimed(self, room: int, address: Address) -> None:
        """May come before `opened`: the router sends to both servers at once."""
        with self._lock:
            self._heard(address)
            self._claim(room, address)

    def renewed(self, rooms: Collection[int], address: Address) -> None:
        """A decode rank has sent the list of all requests that it still has. It claims them, too:
        the claim itself may have been lost."""
        wanted = set(rooms)
        with self._lock:
            self._heard(address)
            for room, claimants in self._claimants.items():
                if address in claimants and room not in wanted:
                    claimants[address] = False
            self._early.renew(wanted, address)
            for room in rooms:
                self._claim(room, address)

    def _claim(self, room: int, address: Address) -> None:
        if room not in self._opened_s:
            self._early.add(room, address, time.monotonic())
            return
        claimants = self._claimants.setdefault(room, {})
        if address in claimants or len(claimants) < self.MAX_CLAIMANTS:
            claimants[address] = True
            self._early.know(address)

    def _heard(self, address: Address) -> None:
        self._heard_s.pop(address, None)
        self._gone_s.pop(address, None)
        self._heard_s[address] = time.monotonic()
        if len(self._heard_s) <= 2 * self.MAX_CLAIMANTS:
            return
        needed = {claimant for claimants in self._claimants.values() for claimant in claimants}
        strangers = [
            rank for rank in self._heard_s if rank not in needed and not self._early.is_known(rank)
        ]
        for rank in strangers[: -self.MAX_CLAIMANTS]:
            del self._heard_s[rank]
            self._gone_s.pop(rank, None)

    def lost(self) -> list[tuple[int, str]]:
        """(room, reason) of each open request whose decode server cannot answer any more."""
        found = []
        with self._lock:
            nobody_left = self._look_for_the_gone()
            for room, since in self._opened_s.items():
                claimants = self._claimants.get(room, {})
                reasons = (self._loss(address, wants) for address, wants in claimants.items())
                reason = next(filter(None, reasons), None)
                if self.expected and not claimants:
                    reason = self._unclaimed(since, nobody_left)
                if reason is not None:
                    found.append((room, reason))
        return found

    def unopened(self) -> list[tuple[int, list[Address]]]:
        """(room, decode ranks that want it) of requests that never arrived here.

        A room is returned once every UNOPENED_S as long as a rank wants it.
        """
        with self._lock:
            now = time.monotonic()

            def is_silent(rank: Address) -> bool:
                return now - self._heard_s.get(rank, 0.0) > self.FORGOTTEN_S

            return list(self._early.overdue(now, self.UNOPENED_S, is_silent).items())

    def refusals(self) -> list[tuple[int, list[Address], str]]:
        """(room, decode ranks that want it, reason) of requests that were refused here. A rank that
        claims a room again is named again: it may not have been told."""
        with self._lock:
            found = []
            for room in [room for room in self._refused if self._early.holds(room)]:
                ranks = [rank for rank, wants in self._early.take(room).items() if wants]
                if ranks:
                    found.append((room, ranks, self._refused[room]))
            return found

    def count_unclaimed(self) -> int:
        """Requests that are here and that no decode rank has claimed."""
        with self._lock:
            return len(self._opened_s.keys() - self._claimants.keys()) if self.expected else 0

    def count_unopened(self) -> int:
        """Requests that decode ranks have claimed and that have not arrived here."""
        with self._lock:
            return self._early.rooms

    def _look_for_the_gone(self) -> bool:
        """Whether there were decode servers, and all of them are gone. Asked only while a request
        waits for one."""
        waiting_since = time.monotonic() - self.ORPHANED_S
        if not any(
            since < waiting_since and room not in self._claimants
            for room, since in self._opened_s.items()
        ):
            return False
        known = [rank for rank in self._heard_s if self._early.is_known(rank)]
        servers = known or list(self._heard_s)[-self.MAX_PROBED :]
        gone = [rank for rank in servers if self._liveness.is_gone(rank)]
        for rank in gone:
            self._gone_s.setdefault(rank, time.monotonic())
        return bool(servers) and gone == servers

    def _unclaimed(self, since: float, nobody_left: bool) -> str | None:
        waited_s = time.monotonic() - since
        if waited_s > self.UNCLAIMED_S:
            return f"no decode server claimed it for {self.UNCLAIMED_S:g} s"
        if waited_s > self.ORPHANED_S:
            if nobody_left:
                return "no decode server claimed it, and all that were known are gone"
            for (host, port), gone_s in self._gone_s.items():
                if since < gone_s + self.LATELY_S:
                    return f"no decode server claimed it, and {host}:{port} is gone"
        return None

    def _loss(self, address: Address, wants: bool) -> str | None:
        server = f"its decode server {address[0]}:{address[1]}"
        if not wants:
            return f"{server} has given it up"
        if self._liveness.is_gone(address):
            return f"{server} is gone"
        if time.monotonic() - self._heard_s.get(address, 0.0) > self.LEASE_S:
            return f"{server} has not been heard of for {self.LEASE_S:g} s"
        return None
