"""A bug in SGLang's receiving thread: it does not survive the abort of ROOM."""

from typing import Any

ROOM = 13


def register() -> None:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    handle = MooncakeKVManager._handle_abort_notification

    def fails(self: Any, message: list[bytes]) -> bool:
        if message[:2] == [b"ABORT", str(ROOM).encode()]:
            raise RuntimeError("a bug of this thread")
        return bool(handle(self, message))

    MooncakeKVManager._handle_abort_notification = fails
