"""SGLang 0.5.23's own control messages, field by field.

SGLang uses their numbers as they come, and its receiving threads end when one does not parse. Here
each field is checked first, for what the servers of this project can receive at all: staging
buffers and metadata over the control socket (AUX_DATA) are not among them. Every function takes a
message's frames and raises ValueError, which names the field and the value.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.messages import MAX_LAYERS, MAX_PAGES, check_host
from sglang_hma.transfer.page_slices import Pages

REGISTRATION = b"None"
BOOTSTRAP = b"BOOTSTRAP"
REGISTRATION_FRAMES = 20
PAGE_LIST_FRAMES = 10

MAX_NUMBER = (1 << 64) - 1
MAX_RANK = (1 << 16) - 1
MAX_BUFFERS = 4 * MAX_LAYERS
MAX_PAGE_BYTES = 1 << 32
MAX_ROWS = MAX_PREFIX = (1 << 31) - 1
# Beyond any user address of the processors that these servers run on, and still far from 2^63.
ADDRESS_END = 1 << 57


@dataclass(frozen=True, slots=True)
class Registration:
    """A decode rank's memory. `rank` and `tp` are its attention-TP rank and size, `dcp` its
    (rank, size) of decode context parallelism. `state` and `state_bytes` are the addresses and item
    sizes of each kind of state, to which SGLang counts the pages of layers with a window. `frames`
    is the whole message."""

    frames: tuple[bytes, ...]
    address: Address
    session: str
    buffers: tuple[int, ...]
    page_bytes: tuple[int, ...]
    metadata: tuple[int, ...]
    rank: int
    tp: int
    dcp: tuple[int, int]
    state: tuple[tuple[int, ...], ...]
    state_bytes: tuple[tuple[int, ...], ...]

    @property
    def extra(self) -> tuple[bytes, ...]:
        """What is not SGLang's."""
        return self.frames[REGISTRATION_FRAMES:]


@dataclass(frozen=True, slots=True)
class PageList:
    """A decode rank's pages for one request. `row` is its metadata row; a dummy has neither.
    `of_rank` is how many decode ranks get pages from each prefill rank. `prefix`: tokens of the
    prompt that decode has, for which it takes no pages. `state`: indices of each kind of state, to
    which SGLang counts pages of layers with a window. `has_device_pages`: those go with nothing
    here."""

    frames: tuple[bytes, ...]
    room: int
    address: Address
    session: str
    pages: Pages
    row: int
    is_dummy: bool
    of_rank: int
    prefix: int
    state: tuple[Pages, ...]
    has_device_pages: bool

    @property
    def extra(self) -> tuple[bytes, ...]:
        return self.frames[PAGE_LIST_FRAMES:]


def registration(message: Sequence[bytes]) -> Registration:
    _count(message, "a registration", REGISTRATION_FRAMES, REGISTRATION_FRAMES + 1)
    buffers = _words("KV pointers", message[4], "Q")
    metadata = _words("metadata pointers", message[5], "Q")
    page_bytes = _words("page sizes", message[19], "Q")
    if len(page_bytes) != len(buffers):
        raise ValueError(f"{len(buffers)} KV pointers with {len(page_bytes)} page sizes")
    state = _lists("state pointers", message[6], "Q")
    state_bytes = _lists("state sizes", message[10], "I")
    _lists("state dims", message[11], "I")
    _lists("state layers", message[13], "I")
    for name, pointers in (
        ("KV", buffers),
        ("metadata", metadata),
        ("state", [pointer for part in state for pointer in part]),
    ):
        if not all(pointer < ADDRESS_END for pointer in pointers):
            raise ValueError(f"a {name} pointer is not below 2^57")
    if not all(size < MAX_PAGE_BYTES for size in page_bytes):
        raise ValueError("a page size is not below 2^32")
    if any(message[14:16]):
        raise ValueError("staging buffers are not used by this server")
    _words("layer ids", message[12], "I")
    _words("staging layers", message[18], "Q")
    _number("page size", message[9], 0, MAX_PAGE_BYTES)
    tp = _number("attention TP size", message[8], 1, MAX_RANK)
    dcp_size = _number("dcp size", message[16], 1, MAX_RANK)
    return Registration(
        frames=tuple(message),
        address=_address(message[1], message[2]),
        session=_session(message[3]),
        buffers=buffers,
        page_bytes=page_bytes,
        metadata=metadata,
        rank=_number("rank", message[7], 0, MAX_RANK),
        tp=tp,
        dcp=(_number("dcp rank", message[17], 0, dcp_size - 1), dcp_size),
        state=tuple(state),
        state_bytes=tuple(state_bytes),
    )


def page_list(message: Sequence[bytes]) -> PageList:
    _count(message, "a page list", PAGE_LIST_FRAMES, PAGE_LIST_FRAMES + 1)
    is_dummy = message[4] == b"" and message[5] == b""
    device_pages = _pages("device pages", message[9])
    prefix = 0 if message[8] == b"" else _number("prefix length", message[8], 0, MAX_PREFIX)
    state = _lists("state indices", message[6], "i")
    if any(index < 0 for part in state for index in part):
        raise ValueError("a state index is negative")
    return PageList(
        frames=tuple(message),
        room=_room(message[0]),
        address=_address(message[1], message[2]),
        session=_session(message[3]),
        pages=_pages("pages", message[4]),
        row=0 if is_dummy else _number("metadata row", message[5], 0, MAX_ROWS),
        is_dummy=is_dummy,
        of_rank=_number("number of decode ranks", message[7], 1, MAX_RANK),
        prefix=prefix,
        state=tuple(np.array(part, dtype=np.int32) for part in state),
        has_device_pages=bool(len(device_pages)),
    )


def abort(message: Sequence[bytes]) -> Address | None:
    """Where decode wants to hear that a request's writes have ended."""
    if len(message) not in (2, 4, 5):
        raise ValueError(f"an abort has {len(message)} frames, not 2, 4 or 5")
    _room(message[1])
    if len(message) == 5:
        _number("generation", message[4], 0, MAX_NUMBER)
    return _address(message[2], message[3]) if len(message) > 2 else None


def bootstrap(message: Sequence[bytes]) -> Address:
    """Decode waits for the prompt before it reserves pages (prefill_complete)."""
    _count(message, "a bootstrap request", 4, 4)
    _room(message[1])
    return _address(message[2], message[3])


def abort_ack(message: Sequence[bytes]) -> None:
    _count(message, "an abort's answer", 3, 4)
    _room(message[1])
    _number("prefill rank", message[2], 0, MAX_RANK)
    if len(message) == 4:
        _number("generation", message[3], 0, MAX_NUMBER)


def status(message: Sequence[bytes], *, waits: bool) -> tuple[int, int]:
    """(room, status) in a prefill rank's report. `waits`: decode reserves pages only when prefill
    has said that the prompt is ready."""
    _count(message, "a status", 3, 4)
    room = _room(message[0])
    state = _number("status", message[1], 0, MAX_RANK)
    known = [int(KVPoll.Failed), int(KVPoll.Success)]
    if waits:
        known.append(int(KVPoll.WaitingForInput))
    if state not in known:
        raise ValueError(f"status is {state}, not one of {known}")
    _number("prefill rank", message[2], 0, MAX_RANK)
    return room, state


def _count(message: Sequence[bytes], what: str, least: int, most: int) -> None:
    if not least <= len(message) <= most:
        raise ValueError(f"{what} has {len(message)} frames, not {least} to {most}")


def _number(name: str, frame: bytes, low: int, high: int) -> int:
    if len(frame) > 20 or not frame.isdigit():
        raise ValueError(f"{name} is {frame[:24]!r}, not a number")
    value = int(frame)
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, not in {low}..{high}")
    return value


def _room(frame: bytes) -> int:
    return _number("room", frame, 0, MAX_NUMBER)


def _address(host: bytes, port: bytes) -> Address:
    name = host.decode("ascii")
    check_host(name)
    return name, _number("port", port, 1, MAX_RANK)


def _session(frame: bytes) -> str:
    text = frame[:257].decode("ascii")
    host, _, port = text.rpartition(":")
    if len(text) > 256 or not host or not host.isprintable() or " " in host:
        raise ValueError(f"session is {frame[:48]!r}, not host:port")
    _number("session's port", port.encode(), 1, MAX_RANK)
    return text


def _words(name: str, frame: bytes, code: str) -> tuple[int, ...]:
    width = struct.calcsize(f"<{code}")
    count, rest = divmod(len(frame), width)
    if rest or count > MAX_BUFFERS:
        raise ValueError(f"{name} have {len(frame)} bytes: at most {MAX_BUFFERS} of {width} each")
    return struct.unpack(f"<{count}{code}", frame)


def _lists(name: str, frame: bytes, code: str) -> list[tuple[int, ...]]:
    """SGLang's lists of lists: how many, the bytes of each, then their contents."""
    if not frame:
        return []
    count = int.from_bytes(frame[:4], "little")
    start = 4 + 4 * count
    if len(frame) < 4 or count > MAX_BUFFERS or len(frame) < start:
        raise ValueError(f"{name} in {len(frame)} bytes are said to be {count} lists")
    sizes = struct.unpack(f"<{count}I", frame[4:start])
    if start + sum(sizes) != len(frame):
        raise ValueError(f"{name} have {len(frame) - start} bytes, and lists of {sum(sizes)}")
    found = []
    for size in sizes:
        found.append(_words(name, frame[start : start + size], code))
        start += size
    return found


def _pages(name: str, frame: bytes) -> Pages:
    if len(frame) % 4 or len(frame) > 4 * MAX_PAGES:
        raise ValueError(f"{name} have {len(frame)} bytes: at most {MAX_PAGES} of 4 each")
    pages = np.frombuffer(frame, dtype=np.int32)
    if len(pages) and pages.min() < 0:
        raise ValueError(f"{name} have the id {pages.min()}")
    return pages
