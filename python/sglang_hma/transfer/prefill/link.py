"""The transfer engine, as far as the send thread needs it."""

from typing import Protocol


class Link(Protocol):
    """Writes to peers' memory. Handles and states are those of Mooncake's engine."""

    def submit(self, session: str, source: int, target: int, length: int) -> int:
        """Start a write. A handle, or 0 if it was refused."""

    def check(self, handle: int) -> int:
        """0 while it runs, 1 when stored and acknowledged, negative if it failed.

        After anything but 0 the handle is invalid and the source is not read any more.
        """


class MooncakeLink:
    def __init__(self, engine: object) -> None:
        self._engine = engine

    def submit(self, session: str, source: int, target: int, length: int) -> int:
        return int(self._engine.transfer_submit_write(session, source, target, length))  # type: ignore[attr-defined]

    def check(self, handle: int) -> int:
        return int(self._engine.transfer_check_status(handle))  # type: ignore[attr-defined]
