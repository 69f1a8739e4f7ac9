"""What a server's gauges show, read by one thread once a second: no loop of a server sets one.

/metrics is answered by another process, from files that this one writes (prometheus_client's
multi-process mode), so nothing can be worked out when somebody asks.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from prometheus_client import Counter, Gauge

PREFIX = "sglang_hma:"
PERIOD_S = 1.0

logger = logging.getLogger(__name__)

Owner = TypeVar("Owner")


@cache
def metric(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """One of prometheus_client's, the same for the same words: `name` is without PREFIX."""
    return kind(PREFIX + name, text, labels, **kwargs)


@dataclass(eq=False)
class Watched:
    name: str
    owner: "weakref.ref[Any]"
    read: Callable[[Any], float]
    show: Callable[[float], None]
    fails: bool = False


class Gauges:
    """Of one process. Where a server has several, /metrics shows the largest value of a gauge, as
    tensor-parallel ranks have the same pages and requests, and the sum of a counter.

    `read` is called with the owner, in the gauges' thread, as long as the owner lives. What it
    looks at may change meanwhile.
    """

    def __init__(self) -> None:
        self._watched: list[Watched] = []
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._thread: threading.Thread | None = None

    def gauge(
        self, name: str, text: str, owner: Owner, read: Callable[[Owner], float], **labels: str
    ) -> None:
        made = metric(Gauge, name, text, tuple(labels), multiprocess_mode="max")
        self._add(name, owner, read, (made.labels(**labels) if labels else made).set)

    def counter(self, name: str, text: str, owner: Owner, read: Callable[[Owner], float]) -> None:
        """`read` tells how many there have been since the owner was made."""
        made, seen = metric(Counter, name, text), 0.0

        def show(total: float) -> None:
            nonlocal seen
            made.inc(max(total - seen, 0.0))
            seen = max(total, seen)

        self._add(name, owner, read, show)

    def _add(
        self, name: str, owner: Owner, read: Callable[[Owner], float], show: Callable[[float], None]
    ) -> None:
        with self._lock:
            self._watched.append(Watched(name, weakref.ref(owner), read, show))

    def read_all(self) -> None:
        """What cannot be read says so once in the log, and is tried again the next time."""
        with self._lock:
            self._watched = [each for each in self._watched if each.owner() is not None]
            every = list(self._watched)
        with self._reading:
            for watched in every:
                self._read(watched)

    def _read(self, watched: Watched) -> None:
        owner = watched.owner()
        if owner is None:
            return
        try:
            watched.show(watched.read(owner))
            watched.fails = False
        except Exception:
            if not watched.fails:
                logger.exception("%s%s cannot be read", PREFIX, watched.name)
            watched.fails = True

    def start(self) -> None:
        """With SGLang's --enable-metrics, once; does nothing without."""
        if self._thread is not None or "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return
        began = metric(
            Gauge,
            "start_time_seconds",
            "When the server's scheduler began, in seconds of Unix time",
            multiprocess_mode="max",
        )
        began.set(time.time())
        self._thread = threading.Thread(target=self._run, name="hma-gauges", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self.read_all()
            time.sleep(PERIOD_S)


GAUGES = Gauges()
