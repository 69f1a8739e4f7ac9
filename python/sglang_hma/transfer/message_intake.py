"""What arrives at a server's control socket, checked before SGLang sees it.

SGLang's receiving thread ends, and with it the server's transfers, when it meets a message that
it cannot parse. Peers are not trusted: a malformed message is dropped with a line in the log.
"""

import logging
from collections.abc import Callable

from sglang.srt.disaggregation.mooncake.conn import ABORT_TAG, TransferInfo

from sglang_hma.transfer import messages
from sglang_hma.transfer.handshake import Handshake

logger = logging.getLogger(__name__)

REGISTRATION = b"None"
# First frames of messages that SGLang parses defensively itself.
SELF_CHECKED = (ABORT_TAG, b"WATERMARK", b"STAGING_RSP")


class MessageIntake:
    """`handler` gets our own messages; those that arrive before it is set are dropped."""

    def __init__(self, handshake: Handshake) -> None:
        self.handshake = handshake
        self.handler: Callable[[messages.Message], None] | None = None
        self._generations: dict[int, dict[str, int]] = {}

    def screen(self, message: list[bytes]) -> list[bytes] | None:
        """The message if it is for SGLang, None if it was one of ours or malformed."""
        if self._handle(message):
            return None
        # On decode SGLang parses all that prefill sends defensively.
        if self.handshake.role == "prefill" and not self._parses(message):
            return None
        return message

    def generation(self, room: int, session: str) -> int | None:
        """The generation that a decode rank wants in messages about a room; None for a rank that
        makes no checksums."""
        return self._generations.get(room, {}).get(session)

    def rooms(self) -> list[int]:
        """Rooms that a generation is kept for."""
        return list(self._generations)

    def forget(self, room: int) -> None:
        self._generations.pop(room, None)

    def _handle(self, message: list[bytes]) -> bool:
        """Whether a message has one of our tags; if so it is dealt with."""
        try:
            ours = messages.parse(message)
            if ours is not None and self.handler is not None:
                self.handler(ours)
        except ValueError as error:
            logger.error("Dropping a malformed message from a peer: %s", error)
            return True
        except Exception:  # the receiving thread must survive whatever a peer sends
            logger.exception("A message from a peer was dropped")
            return True
        return ours is not None

    def _parses(self, message: list[bytes]) -> bool:
        """Whether SGLang's prefill server will be able to parse a message. Keeps what only we
        read of it: the peer's format, or the request's generation."""
        try:
            if message[0] in SELF_CHECKED:
                return True
            if message[0] == REGISTRATION:
                self.handshake.remember(message)
            else:
                self._remember_request(message)
        except Exception as error:
            logger.error("Dropping a malformed message from a decode server: %r", error)
            return False
        return True

    def _remember_request(self, message: list[bytes]) -> None:
        """A decode rank's pages for one request; HmaDecodeManager appends the generation."""
        info = TransferInfo.from_zmq(message)
        if (info.dst_kv_indices < 0).any():
            raise ValueError("negative page index")
        if len(message) > 10 and message[10]:
            generation = int(message[10].decode("ascii"))
            self._generations.setdefault(info.room, {})[info.mooncake_session_id] = generation
