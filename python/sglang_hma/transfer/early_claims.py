"""Claims of requests that have not arrived on this prefill server.

The router sends both halves of a request at once, so a claim may be first; and the half that
belongs here may be lost, which decode must be told. But anybody can claim numbers that nobody
knows. So what is kept is bounded, and strangers only push out what strangers have claimed.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from sglang_hma.transfer.liveness import Address

MAX_EARLY = 1 << 16  # claims in all
MAX_EARLY_PER_RANK = 1 << 14


@dataclass
class EarlyClaim:
    since_s: float
    wants: bool = True


class EarlyClaims:
    """By decode rank, oldest first. A rank is known once it has claimed a request that was here."""

    def __init__(self) -> None:
        self._by_rank: dict[Address, dict[int, EarlyClaim]] = {}
        self._by_room: dict[int, dict[Address, EarlyClaim]] = {}
        self._known: dict[Address, None] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def rooms(self) -> int:
        """How many requests have been claimed."""
        return len(self._by_room)

    def is_known(self, rank: Address) -> bool:
        return rank in self._known

    def know(self, rank: Address) -> None:
        self._known.pop(rank, None)
        self._known[rank] = None
        while len(self._known) > MAX_EARLY:
            del self._known[next(iter(self._known))]

    def add(self, room: int, rank: Address, now_s: float) -> None:
        claims = self._by_rank.setdefault(rank, {})
        if room in claims:
            claims[room].wants = True
            return
        claims[room] = self._by_room.setdefault(room, {})[rank] = EarlyClaim(now_s)
        self._count += 1
        if len(claims) > MAX_EARLY_PER_RANK:
            self._drop(rank, next(iter(claims)))
        while self._count > MAX_EARLY:
            self._drop_one()

    def renew(self, rooms: Collection[int], rank: Address) -> None:
        """A rank's list of all that it wants: its other claims stand no more."""
        for room, claim in self._by_rank.get(rank, {}).items():
            claim.wants = room in rooms

    def holds(self, room: int) -> bool:
        return room in self._by_room

    def take(self, room: int) -> dict[Address, bool]:
        """Whether each rank that has claimed a room wants it; the claims are removed."""
        wants = {rank: claim.wants for rank, claim in self._by_room.get(room, {}).items()}
        for rank in wants:
            self._drop(rank, room)
        return wants

    def overdue(
        self, now_s: float, after_s: float, is_silent: Callable[[Address], bool]
    ) -> dict[int, list[Address]]:
        """Rooms that were claimed more than `after_s` ago, with the ranks that want them; their
        time begins anew. Old claims that nobody wants are removed, and those of silent ranks: one
        that lives claims them again with its next list."""
        found: dict[int, list[Address]] = {}
        for rank, claims in list(self._by_rank.items()):
            for room, claim in list(claims.items()):
                if now_s - claim.since_s <= after_s:
                    continue
                if claim.wants:
                    claim.since_s = now_s
                    found.setdefault(room, []).append(rank)
                if not claim.wants or is_silent(rank):
                    self._drop(rank, room)
        return found

    def _drop_one(self) -> None:
        """The oldest claim of a stranger; if there are none, of the rank with the most."""
        rank = next((rank for rank in self._by_rank if rank not in self._known), None)
        if rank is None:
            rank = max(self._by_rank, key=lambda known: len(self._by_rank[known]))
        self._drop(rank, next(iter(self._by_rank[rank])))

    def _drop(self, rank: Address, room: int) -> None:
        claims, ranks = self._by_rank[rank], self._by_room[room]
        del claims[room], ranks[rank]
        self._count -= 1
        if not claims:
            del self._by_rank[rank]
        if not ranks:
            del self._by_room[room]
