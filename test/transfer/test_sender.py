"""Sender and receiver together, in one process: pages are copied between two arrays by a link that
ends writes at random times, and the messages between the two take any time as well."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.holds import PageHolds
from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer import messages
from sglang_hma.transfer.decode.receiver import DecodeReceiver
from sglang_hma.transfer.integrity import MAX_RESENDS, HostMemory
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.page_slices import Buffers, PageSlice, SlicePair, slice_pairs
from sglang_hma.transfer.prefill import sender
from sglang_hma.transfer.prefill.jobs import EarlySend, Job
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.outgoing import Destination
from sglang_hma.transfer.prefill.sender import PrefillSender
from sglang_hma.transfer.prefill.trace import Trace

LAYERS, PAGES, PAGE_BYTES, ROWS = 3, 24, 96, 8
PREFILL, DECODE, SESSION = ("10.0.0.1", 5001), ("10.0.0.2", 5002), "10.0.0.2:15001"


class Memory:
    """One server's pages [2 * layers, pages, bytes] and metadata rows."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.pages = rng.integers(0, 256, (2 * LAYERS, PAGES, PAGE_BYTES), dtype=np.uint8)
        self.rows = rng.integers(0, 256, (ROWS, 16), dtype=np.uint8)
        self.buffers = Buffers(
            tuple(int(buffer.ctypes.data) for buffer in self.pages), (PAGE_BYTES,) * 2 * LAYERS
        )
        self.metadata = PageSlice.part(int(self.rows.ctypes.data), 16)

    def at(self, address: int, length: int) -> np.ndarray:
        for data in (self.pages, self.rows):
            start = address - int(data.ctypes.data)
            if 0 <= start < data.nbytes:
                return data.reshape(-1)[start : start + length]
        raise AssertionError("an address outside of all registered memory")


class Link:
    """Ends writes at random times; changes a byte of every one while `flips` is set."""

    def __init__(self, source: Memory, target: Memory, rng: random.Random) -> None:
        self.source, self.target, self.rng = source, target, rng
        self.flips = self.fails = False
        self.running: dict[int, tuple[int, int, int]] = {}
        self.handles = 0

    def submit(self, session: str, source: int, target: int, length: int) -> int:
        assert session == SESSION
        self.handles += 1
        self.running[self.handles] = source, target, length
        return self.handles

    def check(self, handle: int) -> int:
        if self.rng.random() < 0.4:
            return 0
        source, target, length = self.running.pop(handle)
        if self.fails:
            return -1
        landed = self.target.at(target, length)
        landed[:] = self.source.at(source, length)
        if self.flips and length >= PAGE_BYTES:
            landed[self.rng.randrange(length)] ^= self.rng.randrange(1, 256)
        return 1


class Servers:
    """Both managers: the status of every room on either side, and the messages between them."""

    def __init__(self, seed: int, *, checksums: bool = True) -> None:
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
            self, self.link, HostMemory(), sizer, trace, layers=LAYERS, rank=0
        )
        self.sender.holds = PageHolds(PAGES)
        self.receiver = DecodeReceiver(self, self.decode.buffers, HostMemory(), SESSION)

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
        self.sender.release_pages(room)
        self.wire.append(lambda: self.reject(room, reason))

    def succeed(self, room: int) -> None:
        assert self.got_status[room] == "succeeded" or not self.checksums
        self.sent_status[room] = "succeeded"

    def report_sent(self, room: int) -> None:
        def arrive() -> None:
            if not self.receiver.defers_success(room, 0):
                self.accept(room, 0)

        self.wire.append(arrive)

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
            self.sender.release_pages(room)

    def start(self, room: int, source: Sequence[int], target: Sequence[int]) -> Destination:
        """Decode has reserved `target` for a request whose pages are `source` here."""
        pages = np.array(target, dtype=np.int32)
        self.sent_status[room], self.got_status[room] = "sending", "waiting"
        if self.checksums:
            self.receiver.expect(room, pages, [PREFILL])
        addresses = self.decode.buffers.addresses
        return Destination(
            session=SESSION,
            address=DECODE,
            generation=self.receiver.generation(room),
            pages=pages,
            slices=slice_pairs(self.prefill.buffers, addresses, prefill=(0, 1), decode=(0, 1)),
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


@pytest.fixture(autouse=True)
def config(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HmaConfig(role="prefill").environment().items():
        monkeypatch.setenv(name, value)


class Request:
    """One request: its pages on both sides, and the events that send it."""

    def __init__(self, servers: Servers, room: int, source: list[int], target: list[int]) -> None:
        self.servers, self.room = servers, room
        self.source, self.target = (np.array(ids, dtype=np.int32) for ids in (source, target))
        self.destination = servers.start(room, source, target)
        self.gate = LayerGate(LAYERS)
        self.row = room % ROWS

    def add(self, part: slice, early: EarlySend | None, row: int | None) -> None:
        self.servers.sender.add(
            self.room,
            self.source[part],
            part,
            early=early,
            metadata_row=row,
            destinations=[self.destination],
        )

    def events(self) -> list[Callable[[], None]]:
        """Some pages leave early, behind a gate; the others with the last send."""
        cut, pages = self.servers.rng.randrange(len(self.source)), len(self.source)
        events: list[Callable[[], None]] = []
        if cut:
            early = EarlySend(self.gate, self.gate)
            events.append(lambda: self.add(slice(0, cut), early, None))
            events += [partial(self.gate.advance, layer) for layer in range(LAYERS)]
        events.append(self.gate.finish)
        events.append(lambda: self.add(slice(cut, pages), None, self.row))
        return events

    def landed(self) -> bool:
        prefill, decode = self.servers.prefill, self.servers.decode
        pages = np.array_equal(decode.pages[:, self.target], prefill.pages[:, self.source])
        return pages and np.array_equal(decode.rows[self.destination.row], prefill.rows[self.row])


def requests(servers: Servers, rooms: int) -> list[Request]:
    """Of random length, with pages of their own."""
    ids = [servers.rng.sample(range(PAGES), PAGES) for _ in range(2)]
    made = []
    for room in range(rooms):
        pages = servers.rng.randrange(1, PAGES // rooms + 1)
        source, target = ([side.pop() for _ in range(pages)] for side in ids)
        made.append(Request(servers, room, source, target))
    return made


def assert_settled(servers: Servers) -> None:
    sender = servers.sender
    assert not sender.requests and not servers.outstanding
    assert sender.holds is not None and not sender.holds.any()


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.booleans())
def test_requests_arrive_whole_and_nothing_else_changes(
    seed: int, rooms: int, checksums: bool
) -> None:
    servers = Servers(seed, checksums=checksums)
    made = requests(servers, rooms)
    before = servers.decode.pages.copy()
    queues = [one.events() for one in made]
    events = []
    while any(queues):
        events.append(servers.rng.choice([queue for queue in queues if queue]).pop(0))
    servers.run(events)
    assert set(servers.sent_status.values()) == set(servers.got_status.values()) == {"succeeded"}
    assert all(one.landed() for one in made)
    untouched = np.setdiff1d(np.arange(PAGES), np.concatenate([one.target for one in made]))
    assert np.array_equal(servers.decode.pages[:, untouched], before[:, untouched])
    assert_settled(servers)


def test_pages_are_held_until_decode_has_verified_them(seed: int) -> None:
    servers = Servers(seed)
    (one,) = requests(servers, 1)
    held = servers.sender.holds.held
    one.add(slice(0, len(one.source)), None, one.row)
    while servers.got_status[0] == "waiting":
        assert held(one.source).all()
        servers.sender.thread.step()
        if servers.wire:
            servers.wire.popleft()()
    assert held(one.source).all()  # the confirmation is still on its way
    servers.run()
    assert_settled(servers)


@pytest.mark.parametrize("lasting", [False, True])
def test_wrong_bytes_are_sent_again_but_not_for_ever(seed: int, lasting: bool) -> None:
    servers = Servers(seed)
    (one,) = requests(servers, 1)
    servers.link.flips = True
    compared = servers.receiver.verifier.compare

    def compare(*args: Any) -> messages.Resend | None:
        resend = compared(*args)
        servers.link.flips = lasting
        return resend

    servers.receiver.verifier.compare = compare  # type: ignore[method-assign]
    servers.run([lambda: one.add(slice(0, len(one.source)), None, one.row)])
    if lasting:
        assert servers.got_status[0] == "failed"
        assert f"arrived with wrong bytes {MAX_RESENDS + 1} times" in servers.reasons[0]
    else:
        assert servers.got_status[0] == servers.sent_status[0] == "succeeded" and one.landed()
    servers.sender.on_tick()
    assert_settled(servers)


def test_a_failed_write_fails_its_request_and_decode_keeps_the_pages(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers(seed)
    (one,) = requests(servers, 1)
    servers.link.fails = True
    servers.run(one.events())
    servers.sender.on_tick()
    assert servers.got_status[0] == servers.sent_status[0] == "failed"
    assert servers.reasons[0] == f"a write to decode server {SESSION} failed"
    assert SESSION in servers.suspects
    assert servers.drained == [], "the failed write may still be on its way"
    monkeypatch.setattr(sender, "QUARANTINE_S", -1.0)
    servers.sender.on_failed(Job(0, SESSION, 0, [], [], one.gate), "again", by_peer=True)
    servers.sender.on_tick()
    assert 0 in servers.drained
    assert_settled(servers)


def test_a_failed_forward_pass_fails_its_request(seed: int) -> None:
    servers = Servers(seed)
    doomed, fine = requests(servers, 2)
    servers.run(
        [
            lambda: doomed.add(slice(0, 1), EarlySend(doomed.gate, doomed.gate), None),
            *fine.events(),
            lambda: doomed.gate.fail("the forward pass failed: out of memory"),
        ]
    )
    servers.sender.on_tick()
    assert servers.got_status == {0: "failed", 1: "succeeded"} and fine.landed()
    assert servers.reasons[0] == "the forward pass failed: out of memory"
    assert_settled(servers)


def test_too_few_reserved_pages_are_refused(seed: int) -> None:
    servers = Servers(seed)
    one = Request(servers, 0, [4, 5, 6], [1, 2])
    servers.run([lambda: one.add(slice(0, 3), None, 0)])
    servers.sender.on_tick()
    assert servers.reasons[0] == "decode reserved 2 pages, too few for the prompt"
    assert_settled(servers)


@pytest.mark.parametrize(
    ("layers", "pages"), [((2, 2), (0, 1)), ((0, 1), (1, 3)), ((0, 1), (2, 1))]
)
def test_decode_cannot_ask_for_pages_of_others(
    seed: int, layers: tuple[int, int], pages: tuple[int, int]
) -> None:
    """Layers that do not exist, pages behind the request's last, pages that were not sent yet."""
    servers = Servers(seed)
    one = Request(servers, 0, [4, 5, 6], [1, 2, 3])
    one.add(slice(0, 2), EarlySend(one.gate, one.gate), None)
    generation = one.destination.generation
    resend = messages.Resend(0, generation, SESSION, *layers, *pages)
    servers.sender.on_message(msgspec.structs.replace(resend, generation=generation + 1))
    servers.sender.on_message(msgspec.structs.replace(resend, session="10.0.0.3:15001"))
    assert servers.sent_status[0] == "sending"
    servers.sender.on_message(resend)
    assert servers.sent_status[0] == "failed"
    servers.run([one.gate.finish])
    assert servers.reasons[0] == "decode asked again for pages that it has no claim to"
    servers.sender.on_tick()
    assert_settled(servers)
