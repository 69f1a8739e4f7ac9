"""Log lines about what peers send: an attacker must not fill the disk with them."""

import logging
import threading
import time
from typing import Any

LINES = 20
PERIOD_S = 60.0
SHOWN_BYTES = 48


class LimitedLog:
    """At most LINES lines every PERIOD_S; the next period begins with how many were left out."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._began_s = 0.0
        self._lines = 0

    def warning(self, text: str, *args: Any, error: BaseException | None = None) -> None:
        """`error`: its traceback is added."""
        with self._lock:
            now = time.monotonic()
            left_out = 0
            if not self._began_s or now - self._began_s > PERIOD_S:
                left_out = max(self._lines - LINES, 0)
                self._began_s, self._lines = now, 0
            self._lines += 1
            silent = self._lines > LINES
        if left_out:
            self._logger.warning("%d more such lines were left out", left_out)
        if not silent:
            self._logger.warning(text, *args, exc_info=error)


def one_line(raw: bytes, most: int) -> str:
    """A text of a peer's, in one line of at most `most` bytes of it."""
    text = raw[:most].decode(errors="replace")
    return "".join(one if one.isprintable() else " " for one in text)


def shown(raw: bytes) -> str:
    """Bytes from a peer, short and printable."""
    text = repr(raw[:SHOWN_BYTES])
    return text if len(raw) <= SHOWN_BYTES else f"{text}... ({len(raw)} bytes)"
