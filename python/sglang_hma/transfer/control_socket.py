"""The socket that a server's receiving thread reads."""

from collections.abc import Callable
from typing import Any

import zmq

from sglang_hma.transfer.messages import MAX_PAGES

# A page list is the longest frame there is. A peer that sends a longer one is disconnected before
# it is received.
MAX_FRAME_BYTES = 4 * MAX_PAGES

Screen = Callable[[list[bytes], str], list[bytes] | None]


class CheckedSocket(zmq.Socket[bytes]):
    """Shares the socket of SGLang's receiving thread. What `screen` keeps (it is called with a
    message and with who sent it) is received as None, as when SGLang's own poll has timed out."""

    screen: Screen

    def __init__(self, shared: zmq.Socket[bytes], screen: Screen) -> None:
        super().__init__(shadow=shared)
        self.screen = screen

    def recv_multipart(self, *args: Any, **kwargs: Any) -> Any:
        parts = super().recv_multipart(copy=False)
        message = [part.bytes for part in parts]
        return self.screen(message, _sender(parts[0]))


def _sender(part: zmq.Frame) -> str:
    try:
        return str(part.get("Peer-Address"))
    except zmq.ZMQError:  # not over TCP
        return "a peer"
