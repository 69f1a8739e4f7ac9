"""Looks at servers again and again, and keeps what it saw for as long as rates are taken over."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sglang_hma.planner.live.fetch import Unheard
from sglang_hma.planner.live.history import Server
from sglang_hma.planner.live.sources import read
from sglang_hma.top.reading import NAMES, Reading, reading
from sglang_hma.top.servers import workers_of

TIMEOUT_S = 5.0
AT_ONCE = 16
ROLES = ("prefill", "decode")


@dataclass(frozen=True)
class Silent:
    """A server or router that told nothing, and why, in one line."""

    url: str
    reason: str


Row = Reading | Silent


class Watch:
    """`urls` are servers' and routers', without a path. Rates and percentiles are of the last
    `window_s`."""

    def __init__(
        self, urls: Sequence[str], window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._urls = list(dict.fromkeys(urls))
        self._window_s = window_s
        self._clock = clock
        self._servers: set[str] = set()  # of `urls`, those that are no routers
        self._looks: dict[str, deque[Server]] = {}

    def look(self) -> list[Row]:
        """Every server now: prefill, decode, then others and those that said nothing."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            asked = list(pool.map(self._servers_of, self._urls))
            silent = [found for found in asked if isinstance(found, Silent)]
            servers = dict.fromkeys(
                url for found in asked if not isinstance(found, Silent) for url in found
            )
            self._looks = {url: self._looks.get(url, deque()) for url in servers}
            return sorted([*pool.map(self._read, servers), *silent], key=_place)

    def _servers_of(self, url: str) -> list[str] | Silent:
        if url in self._servers:
            return [url]
        try:
            workers = workers_of(url, TIMEOUT_S)
        except Unheard as error:
            return Silent(url, _without(url, error))
        if workers is None:
            self._servers.add(url)
            return [url]
        return workers or Silent(url, "a router without servers")

    def _read(self, url: str) -> Row:
        server = Server(f"{url}/metrics")
        try:
            read(self._clock, server, names=NAMES, timeout_s=TIMEOUT_S)
        except Unheard as error:
            return Silent(url, _without(server.name, error))
        if math.isinf(server.end):
            return Silent(url, "has a router's metrics: give the URL that the router serves on")
        looks = self._looks[url]
        looks.append(server)
        while len(looks) > 2 and server.end - looks[1].end >= self._window_s:
            looks.popleft()
        seen = looks[0].then(server) if len(looks) > 1 else server
        return reading(url, seen, time.time())


def _without(name: str, error: Unheard) -> str:
    return str(error).removeprefix(name).removeprefix("/workers").removeprefix(": ")


def _place(row: Row) -> tuple[int, str]:
    role = row.role if isinstance(row, Reading) else ""
    place = ROLES.index(role) if role in ROLES else len(ROLES) + (not role)
    return place, row.url
