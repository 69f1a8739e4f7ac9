"""What decode servers have said of requests whose other half never came here.

SGLang keeps the pages that decode has reserved until the request ends here. A request that never
began here never ends.
"""

from collections.abc import Collection

KEPT_S = 90.0  # twice as long as Claims.UNOPENED_S, after which decode is told
MAX_KEPT = 1 << 14


class Strays:
    """When each room without a request was first seen here."""

    def __init__(self) -> None:
        self._since_s: dict[int, float] = {}

    def overdue(self, rooms: Collection[int], now_s: float) -> list[int]:
        """Of `rooms`, which are all that have no request now, those to forget: seen more than
        KEPT_S ago, or the oldest beyond MAX_KEPT."""
        known = {room: since for room, since in self._since_s.items() if room in rooms}
        self._since_s = known | {room: now_s for room in rooms if room not in known}
        oldest_first = list(self._since_s)
        beyond = len(oldest_first) - MAX_KEPT
        return [
            room
            for place, room in enumerate(oldest_first)
            if place < beyond or now_s - self._since_s[room] > KEPT_S
        ]
