"""Which requests are open on this server: a room names one request at a time."""

import threading

MAX_ROOM = (1 << 63) - 1


class Rooms:
    """SGLang's tables are by room, so that two requests with one room would share their pages and
    their outcome. The first that opens a room has it until it ends."""

    def __init__(self) -> None:
        self._published: dict[int, bool] = {}
        self._lock = threading.Lock()

    def open(self, room: object) -> str | None:
        """Why a request cannot have this room, or None: now it has it."""
        if not isinstance(room, int) or not 0 <= room <= MAX_ROOM:
            return f"bootstrap_room {room!r} is not a number in 0..2^63-1"
        with self._lock:
            if room in self._published:
                return (
                    f"bootstrap_room {room} belongs to another request that has not ended: "
                    "give each request a room of its own, as SGLang's router does"
                )
            self._published[room] = False
            return None

    def publish(self, room: int) -> None:
        """On decode: prefill is about to learn of the request's pages."""
        with self._lock:
            if room in self._published:
                self._published[room] = True

    def close(self, room: int) -> None:
        with self._lock:
            self._published.pop(room, None)

    def is_open(self, room: int) -> bool:
        return room in self._published

    def is_published(self, room: int) -> bool:
        return self._published.get(room, False)
