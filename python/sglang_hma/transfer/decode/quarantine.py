"""When a failed request's pages may be given to another.

SGLang keeps them until prefill confirms that nothing is on its way, or a time has passed. A time
proves nothing: a prefill server that was stopped, or a link that was silent, may write afterwards.
Here they are kept until one of these holds, however long it takes:

confirmed   Every prefill rank has confirmed that its writes have ended and that its host holds
            nothing of those that failed (drain.py).
gone        The processes of the others have ended. Their host may still hold bytes, so connections
            that may be theirs have to end, or ORPHAN_S to pass: that is as long as Linux keeps a
            connection that no process holds (tcp_orphan_retries is 8: 102 s of retransmission,
            looked at after pauses that double).

Then what had reached this host by that time has to be read.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import attrgetter

from sglang_hma.transfer.drain import Drain
from sglang_hma.transfer.tcp_table import Connection, Key, connections

ORPHAN_S = 300.0
# A device's memory is written after the host has read the connection.
COPY_S = 1.0
LOOK_S = 0.05


@dataclass
class Kept:
    """A failed request. `suspects` are connections that have to end, from `gone_s` on; `drain`
    waits for what has to be read after that."""

    suspects: set[Key] | None = None
    gone_s: float = 0.0
    drain: Drain | None = None


class Quarantine:
    """All calls come from the scheduler's thread. `neighbours` are the addresses of prefill servers
    that are there, asked for once for a request whose prefill ranks have ended; `ports` are those
    on which this process takes Mooncake's connections, `rows` the kernel's table."""

    def __init__(
        self,
        ports: Collection[int],
        neighbours: Callable[[], Collection[str]],
        rows: Callable[[], list[Connection]] = connections,
    ) -> None:
        self._ports = frozenset(ports)
        self._neighbours = neighbours
        self._read = rows
        self._rows: list[Connection] = []
        self._read_s = 0.0
        self._kept: dict[int, Kept] = {}

    def is_safe(self, room: int, *, confirmed: bool, gone: Collection[str] | None = None) -> bool:
        """Whether nothing can be written to the pages of this room any more.

        `gone` are the addresses of its prefill ranks that have not confirmed, if the processes of
        all of them have ended.
        """
        now = time.monotonic()
        kept = self._kept.setdefault(room, Kept())
        incoming = self._incoming(now)
        if kept.drain is None:
            if not confirmed and (gone is None or not self._ended(kept, incoming, gone, now)):
                return False
            kept.drain = Drain(incoming, attrgetter("unread"), least_s=COPY_S, settle_s=COPY_S)
        return kept.drain.update(incoming)

    def forget(self, room: int) -> None:
        self._kept.pop(room, None)

    def _incoming(self, now: float) -> list[Connection]:
        """Connections to Mooncake's ports here, and the other ends of those that have it here."""
        if now - self._read_s > LOOK_S:
            both = (each for each in self._read() if not each.listening)
            self._rows = [each for each in both if self._ports & {each.local[1], each.remote[1]}]
            self._read_s = now
        return self._rows

    def _ended(
        self, kept: Kept, incoming: list[Connection], gone: Collection[str], now: float
    ) -> bool:
        # A connection whose other end is held by a process of this host is not of one that is gone.
        held = {(each.remote, each.local) for each in incoming if each.inode}
        open_ended = {each.key for each in incoming} - held
        if kept.suspects is None:
            others = set(self._neighbours()) - set(gone)
            kept.suspects = {key for key in open_ended if key[1][0] not in others}
            kept.gone_s = now
        kept.suspects &= open_ended
        return not kept.suspects or now - kept.gone_s > ORPHAN_S
