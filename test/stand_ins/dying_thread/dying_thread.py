"""A bug in SGLang's receiving thread: it does not survive the abort of ROOM."""

from typing import Any

ROOM = 13


def register() -> None:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    handle = MooncakeKVManager._handle_abort_notification

    def fails(self: Any, msg: list[bytes]) -> bool:
        if msg[:2] == [b"ABORT", str(ROOM).encode()]:
            raise RuntimeError("a bug of this thread")
        return bool(handle(self, msg))

    MooncakeKVManager._handle_abort_notification = fails
