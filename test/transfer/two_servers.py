"""A prefill sender and a decode receiver in one process.

Pages are copied between two arrays by a link that ends writes at random times, and the messages
between the two take any time as well. Nothing runs in a thread of its own.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from sglang_hma.transfer import messages
from sglang_hma.transfer.decode.receiver import DecodeReceiver
from sglang_hma.transfer.integrity import HostMemory
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.page_slices import Buffers, PageSlice, SlicePair, slice_pairs
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.outgoing import Destination
from sglang_hma.transfer.prefill.sender import PrefillSender
from sglang_hma.transfer.prefill.trace import Trace

LAYERS, PAGES, PAGE_BYTES, ROWS = 3, 24, 96, 8
WINDOW_LAYERS, WINDOW_PAGES = 2, 16
PREFILL, DECODE, SESSION = ("10.0.0.1", 5001), ("10.0.0.2", 5002), "10.0.0.2:15001"


class Memory:
    """One server's pages [2 * layers, pages, bytes], those of layers with a window, and metadata
    rows."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.pages = rng.integers(0, 256, (2 * LAYERS, PAGES, PAGE_BYTES), dtype=np.uint8)
        self.rows = rng.integers(0, 256, (ROWS, 16), dtype=np.uint8)
        window = (2 * WINDOW_LAYERS, WINDOW_PAGES, PAGE_BYTES)
        self.window = rng.integers(0, 256, window, dtype=np.uint8)
        self.buffers = [
            Buffers(tuple(int(buffer.ctypes.data) for buffer in kind), (PAGE_BYTES,) * len(kind))
            for kind in (self.pages, self.window)
        ]
        self.metadata = PageSlice.part(int(self.rows.ctypes.data), 16)

    def at(self, address: int, length: int) -> np.ndarray:
        for data in (self.pages, self.window, self.rows):
            start = address - int(data.ctypes.data)
            if 0 <= start < data.nbytes:
                return data.reshape(-1)[start : start + length]
        raise AssertionError("an address outside of all registered memory")


class Link:
    """Ends writes at random times, and none while `silent` is set; changes a byte of every one of
    pages while `flips` is set, of metadata while `flips_rows` is."""

    def __init__(self, source: Memory, target: Memory, rng: random.Random) -> None:
        self.source, self.target, self.rng = source, target, rng
        self.flips = self.fails = self.flips_rows = self.silent = False
        self.running: dict[int, tuple[int, int, int]] = {}
        self.handles = 0

    def submit(self, session: str, source: int, target: int, length: int) -> int:
        assert session == SESSION
        self.handles += 1
        self.running[self.handles] = source, target, length
        return self.handles

    def check(self, handle: int) -> int:
        if self.silent or self.rng.random() < 0.4:
            return 0
        source, target, length = self.running.pop(handle)
        if self.fails:
            return -1
        landed = self.target.at(target, length)
        landed[:] = self.source.at(source, length)
        if self.flips if length >= PAGE_BYTES else self.flips_rows:
            landed[self.rng.randrange(length)] ^= self.rng.randrange(1, 256)
        return 1


class AtOnce(Executor):
    """Does what it is given in the caller's thread."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args, **kwargs))
        return done


class Servers:
    """Both managers: the status of every room on either side, and the messages between them.

    `kinds` of pages: 2 where layers with a window have a pool of their own."""

    def __init__(self, seed: int, *, checksums: bool = True, kinds: int = 1) -> None:
        self.kinds = kinds
        self.rng = random.Random(seed)
        self.prefill, self.decode = Memory(seed), Memory(seed + 1)
        self.link = Link(self.prefill, self.decode, self.rng)
        self.sent_status: dict[int, str] = {}
        self.got_status: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.outstanding: dict[int, int] = {}
        self.drained: list[int] = []
        self.suspects: list[str] = []
        self.wire: deque[Callable[[], None]] = deque()
        self.checksums = checksums
        sizer, trace = GroupSizer(), Trace(None, "")
        self.sender = PrefillSender(
            *(self, self.link, HostMemory(), sizer, trace),
            layers=[LAYERS, WINDOW_LAYERS][:kinds],
            rank=0,
            hashing=AtOnce(),
        )
        rows = [self.decode.metadata]
        self.receiver = DecodeReceiver(
            self, self.decode.buffers[:kinds], HostMemory(), SESSION, rows
        )

    # -- both protocols --

    def tell(self, address: Address, message: messages.Message) -> None:
        on_message = {PREFILL: self.sender.on_message, DECODE: self.receiver.on_message}[address]
        frames = messages.frames(message)
        self.wire.append(lambda: on_message(messages.parse(frames)))  # type: ignore[arg-type]

    # -- base.PrefillManager --

    def is_failed(self, room: int) -> bool:
        return self.sent_status.get(room, "failed") == "failed"

    def is_concluded(self, room: int) -> bool:
        return self.sent_status.get(room) != "sending"

    def fail(self, room: int, reason: str) -> None:
        self.sent_status[room] = "failed"
        self.wire.append(lambda: self.reject(room, reason))

    def succeed(self, room: int) -> None:
        assert self.got_status[room] == "succeeded" or not self.checksums
        self.sent_status[room] = "succeeded"

    def report_sent(self, room: int) -> None:
        def arrive() -> None:
            if not self.receiver.defers_success(room, 0):
                self.accept(room, 0)

        self.wire.append(arrive)

    def forget_strays(self) -> None:
        """Nothing arrives here that was not started."""

    def report_unopened(self, room: int, ranks: Sequence[Address], reason: str) -> None:
        self.wire.append(lambda: self.reject(room, reason))

    def add_sends(self, room: int, change: int) -> None:
        self.outstanding[room] = self.outstanding.get(room, 0) + change

    def sends(self, room: int) -> int:
        return self.outstanding.get(room, 0)

    def confirm_drained(self, room: int) -> None:
        if self.sender.is_drained(room):
            assert self.sends(room) == 0
            self.drained.append(room)

    def suspect(self, session: str) -> None:
        self.suspects.append(session)

    def close_room(self, room: int) -> None:
        assert self.outstanding.pop(room, 0) == 0

    # -- base.DecodeManager --

    def accept(self, room: int, prefill_rank: int) -> None:
        assert self.got_status[room] == "waiting"
        self.got_status[room] = "succeeded"

    def reject(self, room: int, reason: str) -> None:
        self.got_status[room] = "failed"
        self.reasons[room] = reason
        self.wire.append(lambda: self.abort(room))

    # -- the test's side --

    def abort(self, room: int) -> None:
        """SGLang's own message from a decode server that has given a request up."""
        if self.sent_status[room] == "sending":
            self.sent_status[room] = "failed"

    def start(
        self, room: int, target: Sequence[int], window: Sequence[int] | None = None
    ) -> Destination:
        """Decode has reserved `target` for a request, and `window` for its last window."""
        pages = [np.array(ids, dtype=np.int32) for ids in (target, window or ())][: self.kinds]
        self.sent_status[room], self.got_status[room] = "sending", "waiting"
        if self.checksums:
            self.receiver.expect(room, pages, [PREFILL], (room + 3) % ROWS)
        return Destination(
            session=SESSION,
            address=DECODE,
            generation=self.receiver.generation(room),
            pages=pages,
            slices=[
                slice_pairs(ours, theirs.addresses, prefill=(0, 1), decode=(0, 1))
                for ours, theirs in zip(self.prefill.buffers, self.decode.buffers, strict=True)
            ][: self.kinds],
            metadata=[SlicePair(self.prefill.metadata, self.decode.metadata)],
            row=(room + 3) % ROWS,
        )

    def run(self, events: Sequence[Callable[[], None]] = ()) -> None:
        """Until everything has come to rest; `events` happen in between, in order."""
        pending = deque(events)
        for _ in range(20000):
            if pending and self.rng.random() < 0.3:
                pending.popleft()()
            if self.wire and self.rng.random() < 0.5:
                self.wire.popleft()()
            if not self.sender.thread.step() and not (pending or self.wire or self.link.running):
                return
        raise AssertionError("it never came to rest")
