"""Where the output of servers and router goes: a file each, rotated by size."""

import os
import re
from logging import LogRecord, makeLogRecord
from logging.handlers import RotatingFileHandler
from pathlib import Path

MAX_BYTES = 16 << 20
KEPT_BEFORE = 2  # NAME.log.1, NAME.log.2

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class LogFile(RotatingFileHandler):
    """NAME.log, after what earlier starts have left there: the last of them may have crashed."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=KEPT_BEFORE, encoding="utf-8")

    def line(self, text: str) -> None:
        self.emit(makeLogRecord({"msg": text}))

    def handleError(self, record: LogRecord) -> None:
        """A full disk stops no fleet."""


def default_dir(port: int) -> Path:
    """Where a user's programs keep their logs (XDG), apart for each router."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "sglang-hma" / "logs" / str(port)
