"""A server ends when a thread of its transfer has: without it requests only hang, and `/health`,
which SGLang answers from other threads, would go on saying that all is well."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

import psutil

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


class ThreadWatch(threading.Thread):
    """Calls `end` with the reason when one of `threads()` has ended and `stopping()` is false."""

    def __init__(
        self,
        threads: Callable[[], Iterable[threading.Thread]],
        stopping: Callable[[], bool],
        end: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(name="hma-thread-watch", daemon=True)
        self._threads = threads
        self._stopping = stopping
        self._end = end if end is not None else ServerEnd()

    def run(self) -> None:
        while not self._stopping():
            for thread in list(self._threads()):
                ended = thread.ident is not None and not thread.is_alive()
                if ended and not self._stopping():
                    self._end(f"the thread {thread.name} of the KV transfer has ended")
                    return
            time.sleep(LOOK_EVERY_S)


class ServerEnd:
    """Ends the server that this scheduler belongs to, as SGLang does when a scheduler raises: its
    parent is told, and ends all of the server's processes. `told`: the parent; give
    `psutil.Process()` in a server's main process."""

    def __init__(self, told: psutil.Process | None = None) -> None:
        self._told = told if told is not None else psutil.Process().parent()

    def __call__(self, reason: str) -> None:
        logger.critical(
            "This server ends: %s (its last words are above), and requests would only hang", reason
        )
        try:
            if self._told is not None:
                self._told.send_signal(signal.SIGQUIT)
                return
        except psutil.Error:
            pass
        os._exit(1)
