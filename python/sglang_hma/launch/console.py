"""What launch_pd shows: whole lines from several threads, and below them what it waits for.

A terminal gets one live line with the elapsed time. Elsewhere a line says what begins, and
another one every STATUS_EVERY_S while it goes on.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO, cast

from sglang_hma.launch.output import Unblocked

if TYPE_CHECKING:
    from rich.progress import Progress

STATUS_EVERY_S = 10.0
LAST_WORDS_S = 2.0  # for a reader to take them
REDRAWS_PER_S = 4


class Console:
    """Plain lines on `out` and `err`."""

    def __init__(
        self, out: TextIO, err: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out, self._err, self._clock = out, err, clock
        self._lock = threading.Lock()
        self._started = self._shown = clock()
        self._phase = ""

    def line(self, text: str) -> None:
        with self._lock:
            self._print(text)

    def error(self, text: str) -> None:
        """A line on `err`. It ends the live line."""
        self.status("")
        with self._lock:
            self._err.write(f"{text}\n")

    def status(self, phase: str, detail: str = "") -> None:
        """What is waited for, "" for nothing. `detail` may change while a phase goes on."""
        with self._lock:
            begins, self._phase = phase != self._phase, phase
            now = self._clock()
            if phase and (begins or now >= self._shown + STATUS_EVERY_S):
                self._shown = now
                text = phase if begins else detail or phase
                self._print(f"sglang-hma: {text} ({self.elapsed():.0f} s)")

    def elapsed(self) -> float:
        return self._clock() - self._started

    def finish(self) -> None:
        """Let the last words through, if somebody reads them."""
        self.status("")
        for stream in (self._out, self._err):
            if isinstance(stream, Unblocked):
                stream.finish(LAST_WORDS_S)

    def _print(self, text: str) -> None:
        self._out.write(f"{text}\n")


class TerminalConsole(Console):
    """Lines above one live line, drawn by rich."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        super().__init__(out, err)
        from rich.console import Console as Rich

        self._rich = Rich(file=out)
        self._live: Progress | None = None

    def status(self, phase: str, detail: str = "") -> None:
        with self._lock:
            if not phase and self._live:
                self._live.stop()
                self._live = None
            elif phase and self._live is None:
                self._live = self._draw(detail or phase)
            elif self._live:
                self._live.tasks[0].description = detail or phase

    def _draw(self, text: str) -> "Progress":
        from rich.progress import Progress, SpinnerColumn, TextColumn
        from rich.table import Column

        whole = Column(no_wrap=True, overflow="ellipsis")
        progress = Progress(
            SpinnerColumn("dots" if self._rich.encoding.startswith("utf") else "line"),
            TextColumn("{task.elapsed:3.0f} s", markup=False),
            TextColumn("{task.description}", markup=False, table_column=whole),
            console=self._rich,
            transient=True,
            refresh_per_second=REDRAWS_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
            get_time=self._clock,
        )
        progress.add_task(text)
        progress.tasks[0].start_time = self._started
        progress.start()
        return progress

    def _print(self, text: str) -> None:
        self._rich.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def console(out: TextIO, err: TextIO) -> Console:
    """The console that `out` can show. It never waits for a reader."""
    live = out.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    out, err = (cast(TextIO, Unblocked(stream)) for stream in (out, err))
    return TerminalConsole(out, err) if live else Console(out, err)
