"""On prefill: which pages decode ranks have published for which request."""

import threading
from collections.abc import Callable

from sglang_hma.transfer.messages import MAX_ROOMS
from sglang_hma.transfer.rooms import Rooms
from sglang_hma.transfer.sglang_messages import PageList

# Of lists for requests that are not open here: their other half may still come.
MAX_WAITING_BYTES = 64 << 20
ENTRY_BYTES = 1024  # what a list takes beside its pages


class PageLists:
    """A request's pages are published once. Whoever publishes others while it is open would have
    its KV written into pages that may be somebody else's.

    `drop` is called with each room that is forgotten because too many wait, the oldest first.
    """

    def __init__(self, rooms: Rooms, drop: Callable[[int], None]) -> None:
        self._rooms = rooms
        self._drop = drop
        self._lists: dict[int, dict[str, PageList]] = {}
        self._waiting_bytes: dict[int, int] = {}  # of rooms that are not open
        self._total_bytes = 0
        self._lock = threading.Lock()

    def add(self, new: PageList) -> bool:
        """Whether it is news. Raises ValueError for other pages than were published before."""
        with self._lock:
            of_room = self._lists.setdefault(new.room, {})
            before = of_room.get(new.session)
            if before is not None and before.frames == new.frames:
                return False
            if before is not None and self._rooms.is_open(new.room):
                raise ValueError(
                    f"{new.session} has published pages for room {new.room} before, and others"
                )
            of_room[new.session] = new
            self._count(new.room, sum(map(_size, of_room.values())))
            dropped = self._drop_surplus()
        for room in dropped:
            self._drop(room)
        return True

    def get(self, room: int, session: str) -> PageList | None:
        return self._lists.get(room, {}).get(session)

    def rooms(self) -> list[int]:
        with self._lock:
            return list(self._lists)

    def opened(self, room: int) -> None:
        with self._lock:
            self._count(room, 0)

    def forget(self, room: int) -> None:
        with self._lock:
            self._lists.pop(room, None)
            self._count(room, 0)

    def _count(self, room: int, size: int) -> None:
        self._total_bytes -= self._waiting_bytes.pop(room, 0)
        if size and not self._rooms.is_open(room):
            self._waiting_bytes[room] = size
            self._total_bytes += size

    def _drop_surplus(self) -> list[int]:
        dropped = []
        while self._total_bytes > MAX_WAITING_BYTES or len(self._waiting_bytes) > MAX_ROOMS:
            room = next(iter(self._waiting_bytes))
            self._lists.pop(room, None)
            self._count(room, 0)
            dropped.append(room)
        return dropped


def _size(one: PageList) -> int:
    return ENTRY_BYTES + sum(map(len, one.frames))
