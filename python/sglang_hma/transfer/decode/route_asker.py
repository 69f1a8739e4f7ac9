"""Bootstrap servers are asked in threads of their own: the scheduler's thread only looks.

One that is cut off, or that answers a byte a second, would hold up all that decode generates.
"""

import itertools
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sglang_hma.transfer.decode import routes

logger = logging.getLogger(__name__)

# So long the scheduler waits for a server's answer, once, and only if no other has to answer yet:
# silent ones cost it no more, however many are named.
PATIENCE_S = 0.1
FRESH_S = 10.0
MAX_ASKED = 64  # servers at a time
MAX_RANKS_ASKED = 64  # of more, SGLang asks when it needs one


@dataclass(frozen=True)
class Found:
    """What a bootstrap server says of its prefill server and of each of its ranks."""

    answer: routes.Answer
    ranks: Mapping[routes.Place, dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    future: Future[Found | None] = field(default_factory=Future)
    since_s: float = field(default_factory=time.monotonic)

    def is_old(self) -> bool:
        """An answer that nobody has looked at: the server may have been restarted since."""
        return self.future.done() and time.monotonic() - self.since_s > FRESH_S


class RouteAsker:
    """Used by the scheduler's thread alone."""

    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}

    def look(self, bootstrap_addr: str) -> Found | None:
        """None as long as there is no answer, or if the last try got none; the next call tries
        again."""
        asked, patience_s = self._asked.get(bootstrap_addr), 0.0
        if asked is None or asked.is_old():
            patience_s = 0.0 if self._asked else PATIENCE_S
            asked = self._ask(bootstrap_addr)
            if asked is None:
                return None
        try:
            found = asked.future.result(patience_s)
        except TimeoutError:
            return None
        del self._asked[bootstrap_addr]
        return found

    def _ask(self, bootstrap_addr: str) -> Asked | None:
        self._asked.pop(bootstrap_addr, None)
        if len(self._asked) >= MAX_ASKED:
            running = {a: asked for a, asked in self._asked.items() if not asked.future.done()}
            self._asked = running
        if len(self._asked) >= MAX_ASKED:
            logger.warning("%d bootstrap servers have not answered yet", MAX_ASKED)
            return None
        asked = self._asked[bootstrap_addr] = Asked()

        def run() -> None:
            try:
                asked.future.set_result(find(bootstrap_addr))
            except Exception:
                logger.exception("Asking %s failed", bootstrap_addr)
                asked.future.set_result(None)

        threading.Thread(target=run, name="hma-routes", daemon=True).start()
        return asked


def find(bootstrap_addr: str) -> Found | None:
    answer = routes.fetch(bootstrap_addr)
    if answer is None:
        return None
    ranks: dict[routes.Place, dict[str, Any]] = {}
    if answer.denied is not None:
        return Found(answer, ranks)
    try:
        route = routes.parse(answer.route)
    except ValueError:
        return Found(answer, ranks)
    places = itertools.product(
        range(route.dp_size),
        range(route.attn_cp_size),
        range(route.attn_tp_size),
        range(route.pp_size),
    )
    for place in itertools.islice(places, MAX_RANKS_ASKED):
        rank = routes.fetch(bootstrap_addr, place)
        if rank is None or rank.denied is not None:
            break
        ranks[place] = rank.route
    return Found(answer, ranks)
