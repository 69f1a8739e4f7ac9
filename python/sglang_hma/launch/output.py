"""Output that no reader can hold up: a launcher that waited for one would neither copy its
servers' output, so that they stop, too, nor hear a signal."""

import contextlib
import io
import os
import select
import threading
import time
from typing import TextIO

MAX_WAITING = 1 << 20  # characters


class Unblocked(io.TextIOBase):
    """Text for `out`'s file, written by a thread of its own; `write` and `flush` return at once.

    What does not fit into `max_waiting` characters while the reader pauses is left out, and said
    when it goes on. Nobody is left to read: the text goes nowhere.
    """

    def __init__(self, out: TextIO, max_waiting: int = MAX_WAITING) -> None:
        self._out, self._max_waiting = out, max_waiting
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        self._size = self._lost = 0
        self._writing = False
        threading.Thread(target=self._copy, daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._out.encoding

    def fileno(self) -> int:
        return self._out.fileno()

    def isatty(self) -> bool:
        return self._out.isatty()

    def write(self, text: str) -> int:
        with self._changed:
            if self._lost or self._size + len(text) > self._max_waiting:
                self._lost += text.count("\n")
            else:
                self._waiting.append(text)
                self._size += len(text)
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """See `finish`: to wait for a reader is what must not be."""

    def finish(self, timeout: float) -> bool:
        """Wait until all is written, at most `timeout` seconds; whether it is."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._waiting or self._writing or self._lost:
                if not self._changed.wait(deadline - time.monotonic()):
                    return False
        return True

    def _copy(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                while not self._waiting and not self._lost:
                    self._changed.wait()
                text, lost = "".join(self._waiting), self._lost
                self._waiting, self._size, self._lost = [], 0, 0
                self._writing = True
            if lost:
                text += f"sglang-hma: {lost} lines left out, for nobody read them\n"
            self._write(text.encode(self.encoding, errors="replace"))

    def _write(self, data: bytes) -> None:
        # Not through `out`: Python waits at its exit for whoever is inside its buffer.
        try:
            while data:
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(self.fileno(), data) :]
                    continue
                select.select([], [self.fileno()], [])
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
