"""What arrives at a server's control socket, checked before SGLang sees it.

SGLang's receiving thread ends, and with it the server's transfers, when it meets a message that it
cannot parse. Peers are not trusted: whatever is not known to be in order is dropped, with a line in
the log.
"""

import contextlib
import logging
from collections.abc import Callable

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_ACK_TAG, ABORT_TAG
from sglang.srt.disaggregation.mooncake.conn import KVArgsRegisterInfo

from sglang_hma.config import PAGE_TOKENS
from sglang_hma.transfer import messages, sglang_messages
from sglang_hma.transfer.handshake import Handshake, introduction_of
from sglang_hma.transfer.limited_log import LimitedLog, one_line, shown
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.page_lists import PageLists
from sglang_hma.transfer.page_slices import Pages
from sglang_hma.transfer.registrations import Registrations
from sglang_hma.transfer.rooms import Rooms
from sglang_hma.transfer.sglang_messages import PageList

logger = logging.getLogger(__name__)

# Which of our messages a prefill server gets; a decode server gets the others.
TO_PREFILL = (messages.Claim, messages.Renewal, messages.Resend, messages.Verified)
TO_DECODE = tuple(kind for kind in messages.TYPES.values() if kind not in TO_PREFILL)

MAX_FRAMES = 32
MAX_REASON = 4096  # bytes


class MessageIntake:
    """`takes` are the messages of ours that this role gets, `checks` says of each first frame of
    SGLang's what makes a message fit for it; messages without a tag go to `check_untagged`. A check
    returns whether SGLang needs the message and raises ValueError if it must not have it.

    `handler` gets our own messages; those that arrive before it is set are dropped.
    """

    takes: tuple[type[messages.Message], ...] = ()

    def __init__(self, role: str, rooms: Rooms) -> None:
        self.role = role
        self.open_rooms = rooms
        self.handler: Callable[[messages.Message], None] | None = None
        self.checks: dict[bytes, Callable[[list[bytes]], bool]] = {}
        self.log = LimitedLog(logger)

    def screen(self, message: list[bytes], sender: str = "a peer") -> list[bytes] | None:
        """The message if it is for SGLang, None if it was one of ours or must not get there."""
        try:
            return message if self._is_for_sglang(message) else None
        except ValueError as error:
            tag = shown(message[0]) if message else "nothing"
            self.log.warning("Dropping the message %s from %s: %s", tag, sender, error)
        except Exception as error:  # the receiving thread must survive whatever a peer sends
            self.log.warning("A message from %s was dropped", sender, error=error)
        return None

    def check_untagged(self, message: list[bytes]) -> bool:
        raise NotImplementedError

    def opened(self, room: int) -> None:
        """A request with this room has begun here."""

    def forget(self, room: int) -> None:
        """It has ended."""

    def _is_for_sglang(self, message: list[bytes]) -> bool:
        if not 0 < len(message) <= MAX_FRAMES:
            raise ValueError(f"it has {len(message)} frames")
        tag = message[0]
        if tag in messages.TYPES and not issubclass(messages.TYPES[tag], self.takes):
            raise ValueError(f"a {self.role} server takes no such message")
        ours = messages.parse(message)
        if ours is not None:
            if self.handler is not None:
                self.handler(ours)
            return False
        if tag in self.checks:
            return self.checks[tag](message)
        if tag.isdigit():
            return self.check_untagged(message)
        raise ValueError(f"a {self.role} server takes no such message")


class DecodeIntake(MessageIntake):
    """`waits`: decode reserves pages only when prefill has said that the prompt is ready."""

    takes = TO_DECODE

    def __init__(self, rooms: Rooms, *, waits: bool) -> None:
        super().__init__("decode", rooms)
        self.waits = waits
        self.checks = {ABORT_ACK_TAG: self._check_abort_ack}

    def check_untagged(self, message: list[bytes]) -> bool:
        room, status = sglang_messages.status(message, waits=self.waits)
        # SGLang logs the reason and answers it.
        message[3:] = [one_line(each, MAX_REASON).encode() for each in message[3:]]
        # SGLang's scheduler ends when a request succeeds that has no pages yet.
        if status == KVPoll.Success and not self.open_rooms.is_published(room):
            raise ValueError(f"room {room} is said to have succeeded, but waits for nothing")
        return True

    def _check_abort_ack(self, message: list[bytes]) -> bool:
        sglang_messages.abort_ack(message)
        return True


class PrefillIntake(MessageIntake):
    """`try_layout` raises what SGLang would raise for a registration; `registered` is called with
    the control port of a rank that has registered. `drop_session` and
    `drop_room` make SGLang forget what the tables here have no room for. `waits` as above."""

    takes = TO_PREFILL

    def __init__(
        self,
        handshake: Handshake,
        rooms: Rooms,
        *,
        waits: bool = False,
        try_layout: Callable[[KVArgsRegisterInfo], None] = lambda info: None,
        registered: Callable[[Address], None] = lambda address: None,
        drop_session: Callable[[str], None] = lambda session: None,
        drop_room: Callable[[int], None] = lambda room: None,
    ) -> None:
        super().__init__("prefill", rooms)
        self.handshake = handshake
        self.registrations = Registrations(self._drop_session)
        self.page_lists = PageLists(rooms, drop_room)
        self._try_layout = try_layout
        self._registered = registered
        self._drop_session_of_sglang = drop_session
        self._introductions: dict[str, messages.Introduction | None] = {}
        self.checks = {
            sglang_messages.REGISTRATION: self._check_registration,
            ABORT_TAG: self._check_abort,
        }
        if waits:
            self.checks[sglang_messages.BOOTSTRAP] = self._check_bootstrap

    def generation(self, room: int, session: str) -> int | None:
        """The generation that a decode rank wants in messages about a room; None for a rank that
        makes no checksums."""
        pages = self.page_lists.get(room, session)
        return _generation(pages) if pages is not None else None

    def rooms(self) -> list[int]:
        """Rooms that pages are known for."""
        return self.page_lists.rooms()

    def opened(self, room: int) -> None:
        self.page_lists.opened(room)

    def forget(self, room: int) -> None:
        self.page_lists.forget(room)

    def check_untagged(self, message: list[bytes]) -> bool:
        """A decode rank's pages for one request; HmaDecodeManager appends the generation."""
        new = sglang_messages.page_list(message)
        _generation(new)
        peer = self.registrations.get(new.session)
        if peer is None or peer.address != new.address:
            raise ValueError(f"session {new.session} has not registered from {new.address}")
        if self.handshake.plain:
            if new.is_dummy:
                raise ValueError("there are no pages in it")
            if new.of_rank != max(1, peer.tp // self.handshake.attn_tp):
                raise ValueError(
                    f"it goes to {new.of_rank} decode ranks, but attention TP is {peer.tp} there "
                    f"and {self.handshake.attn_tp} here"
                )
        if not self.handshake.stock_allowed:
            kinds = len(self.handshake.memory.pages)
            if new.has_device_pages or 1 + len(new.state) != kinds:
                raise ValueError(
                    f"{len(new.state)} lists of state, or device pages, do not go with {kinds} "
                    "kinds of BFP8 pages"
                )
            for window in new.state:
                self._check_window(window)
            if new.prefix and (new.prefix % PAGE_TOKENS or not len(new.pages)):
                raise ValueError(
                    f"{len(new.pages)} pages behind a cached prefix of {new.prefix} tokens"
                )
        memory = self._introductions.get(new.session)
        if memory is not None:
            # A registration that is refused may say anything.
            for pages, count in zip((new.pages, *new.state), memory.pages, strict=False):
                if len(pages) and pages.max() >= count:
                    raise ValueError(f"page {pages.max()} of {count}")
            if new.row >= memory.rows:
                raise ValueError(f"metadata row {new.row} of {memory.rows}")
        return self.page_lists.add(new)

    def _check_window(self, pages: Pages) -> None:
        most = self.handshake.format.most_window_pages
        if not 0 < len(pages) <= most:
            raise ValueError(f"a window of {len(pages)} pages: there may be 1 to {most}")
        if len(set(pages.tolist())) != len(pages):
            raise ValueError(f"a window of pages {pages.tolist()}, one of them twice")

    def _check_registration(self, message: list[bytes]) -> bool:
        new = sglang_messages.registration(message)
        self._try_layout(KVArgsRegisterInfo.from_zmq(list(message)))
        self.registrations.admit(new)
        self._introductions.pop(new.session, None)
        with contextlib.suppress(ValueError):  # the handshake refuses it, in words
            self._introductions[new.session] = introduction_of(new)
        self._registered(new.address)
        return True

    def _drop_session(self, session: str) -> None:
        self._introductions.pop(session, None)
        self._drop_session_of_sglang(session)

    def _check_abort(self, message: list[bytes]) -> bool:
        address = sglang_messages.abort(message)
        if address is not None:
            self._check_known(address)
        return True

    def _check_bootstrap(self, message: list[bytes]) -> bool:
        self._check_known(sglang_messages.bootstrap(message))
        return True

    def _check_known(self, address: tuple[str, int]) -> None:
        if not self.registrations.has_address(address):
            raise ValueError(f"no decode server has registered from {address}")


def _generation(pages: PageList) -> int | None:
    frame = pages.extra[0] if pages.extra else b""
    if not frame:
        return None
    if not frame.isdigit() or len(frame) > 20:
        raise ValueError(f"generation is {frame[:24]!r}, not a number")
    return int(frame)
