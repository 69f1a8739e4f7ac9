"""When no byte of a failed write can arrive any more.

A write that Mooncake gives up leaves a closed connection, and the kernel goes on sending what it
holds of it: for minutes, if the link is silent, and a FIN-WAIT-1 socket's bytes are as good as any
when the link is back. So pages of a failed write are reused only when these bytes are gone, which
both ends read off the kernel's tables:

- prefill confirms a room when each connection to the decode server that held unacknowledged bytes
  after the failure has been seen without any, or has ended (`Drain` of what is unacknowledged);
- decode then waits until each of its connections that held unread bytes has been seen without any,
  or has ended, and until what was read last can be where it goes (`Drain` of what is unread).

One that ends with bytes unacknowledged was given up by the kernel. Packets of it may still be in
the network, for NETWORK_S at most.
"""

import time
from collections.abc import Callable, Iterable

from sglang_hma.transfer.tcp_table import Connection, Key

NETWORK_S = 10.0


class Drain:
    """Waits until each of `connections` has been seen with nothing queued, or is gone.

    `queued` says whether a connection holds bytes. `least_s` is how long to wait in any case, and
    from when one has gone that held some when it was last seen; `settle_s` from when one that did
    is seen with nothing queued.
    """

    def __init__(
        self,
        connections: Iterable[Connection],
        queued: Callable[[Connection], bool],
        *,
        least_s: float = 0.0,
        settle_s: float = 0.0,
    ) -> None:
        self._queued = queued
        self._least_s, self._settle_s = least_s, settle_s
        self._waiting: set[Key] = {each.key for each in connections if queued(each)}
        self._until_s = time.monotonic() + least_s

    def update(self, connections: Iterable[Connection]) -> bool:
        """Look again. Whether all have drained."""
        rows = {each.key: each for each in connections}
        for key in list(self._waiting):
            if key in rows and self._queued(rows[key]):
                continue
            wait_s = self._settle_s if key in rows else self._least_s
            self._until_s = max(self._until_s, time.monotonic() + wait_s)
            self._waiting.discard(key)
        return not self._waiting and time.monotonic() >= self._until_s
