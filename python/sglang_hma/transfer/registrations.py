"""On prefill: the memory of each decode rank that has registered."""

import threading
import time
from collections.abc import Callable

from sglang_hma.transfer.liveness import Address, refuses
from sglang_hma.transfer.sglang_messages import Registration

MAX_SESSIONS = 1024
# Asking an address holds up the control thread: for so long, and not more often than that.
CONNECT_S = 0.05
ASK_EVERY_S = 1.0


def _refuses(address: Address) -> bool:
    return refuses(address, CONNECT_S)


class Registrations:
    """A session's memory stays what it was as long as its process lives.

    A restarted decode server has a session of its own, by Mooncake's random port. Should it draw
    the port of a process before it, then that one's control port refuses connections by now:
    `refuses_connections` tells. `drop` is called with each session that is forgotten.
    """

    def __init__(
        self,
        drop: Callable[[str], None],
        refuses_connections: Callable[[Address], bool] = _refuses,
    ) -> None:
        self._drop = drop
        self._refuses_connections = refuses_connections
        self._sessions: dict[str, Registration] = {}
        self._asked_s = -ASK_EVERY_S
        self._lock = threading.Lock()

    def admit(self, new: Registration) -> None:
        """Raises ValueError if another process has this session, or too many are known."""
        known = self._sessions.get(new.session)
        if known is None:
            self._look_at_the_oldest()
            if len(self._sessions) >= MAX_SESSIONS:
                raise ValueError(f"{MAX_SESSIONS} decode ranks are registered and not known to end")
        elif known.frames != new.frames and not self._is_gone(known.address):
            raise ValueError(
                f"session {new.session} was registered with other memory by "
                f"{known.address[0]}:{known.address[1]}, which has not ended"
            )
        with self._lock:
            self._sessions[new.session] = new

    def get(self, session: str) -> Registration | None:
        return self._sessions.get(session)

    def has_address(self, address: Address) -> bool:
        with self._lock:
            return any(one.address == address for one in self._sessions.values())

    def _look_at_the_oldest(self) -> None:
        """Servers restart more often than there is room for: every newcomer has one forgotten that
        has ended, in turn."""
        oldest = next(iter(self._sessions), None)
        if oldest is None:
            return
        ended = self._is_gone(self._sessions[oldest].address)
        with self._lock:
            one = self._sessions.pop(oldest)
            if not ended:
                self._sessions[oldest] = one
        if ended:
            self._drop(oldest)

    def _is_gone(self, address: Address) -> bool:
        now = time.monotonic()
        if now - self._asked_s < ASK_EVERY_S:
            return False
        self._asked_s = now
        return self._refuses_connections(address)
