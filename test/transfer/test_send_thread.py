"""The send thread over a simulated link with any timing, and over real Mooncake engines."""

import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.messages import Landed
from sglang_hma.transfer.page_slices import Buffers, page_runs, slice_pairs
from sglang_hma.transfer.prefill import send_thread
from sglang_hma.transfer.prefill.jobs import Group, Job, LayerRange
from sglang_hma.transfer.prefill.link import MooncakeLink
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.send_thread import MAX_WRITES, WINDOW, SendThread

LAYERS, PAGE_BYTES, PAGES = 6, 24, 40
METADATA_BYTES = 8


class SimulatedLink:
    """Moves bytes between two arrays, whenever its script says that a write ends."""

    def __init__(self, rng: random.Random, fail_first: int = 0, dead: Sequence[str] = ()) -> None:
        self.rng, self.fail_first, self.dead = rng, fail_first, dead
        self.tries: dict[int, int] = {}
        self.source = np.random.default_rng(rng.randrange(2**32)).integers(
            1, 256, 1 << 16, dtype=np.uint8
        )
        self.targets: dict[str, np.ndarray] = {}
        self.running: dict[int, tuple[str, int, int, int]] = {}
        self.next = 1

    def target(self, session: str) -> np.ndarray:
        return self.targets.setdefault(session, np.zeros(1 << 16, dtype=np.uint8))

    def submit(self, session: str, source: int, target: int, length: int) -> int:
        if session in self.dead and self.rng.random() < 0.5:
            return 0
        handle, self.next = self.next, self.next + 1
        self.running[handle] = (session, source, target, length)
        return handle

    def check(self, handle: int) -> int:
        assert handle in self.running, "a handle was used after it ended"
        if self.rng.random() < 0.4:
            return 0
        session, source, target, length = self.running.pop(handle)
        self.tries[target] = self.tries.get(target, 0) + 1
        if session in self.dead or self.tries[target] <= self.fail_first:
            return -1
        self.target(session)[target : target + length] = self.source[source : source + length]
        return 1


class Recorder:
    """A listener that writes down what it is told."""

    def __init__(self, link: SimulatedLink) -> None:
        self.link = link
        self.aborted: set[int] = set()
        self.failed: dict[int, str] = {}
        self.finished: list[Job] = []
        self.layers: dict[int, int] = {}

    def is_cancelled(self, room: int) -> bool:
        return room in self.aborted or room in self.failed

    def on_submitted(self, layers: LayerRange) -> Future[Landed]:
        made: Future[Landed] = Future()
        made.set_result(announcement(layers))
        return made

    def on_acked(self, layers: LayerRange) -> None:
        assert layers.announcement is not None
        assert layers.announcement.result() == announcement(layers)
        job = layers.job
        for pairs in job.slices[layers.first_layer : layers.first_layer + layers.layers]:
            for pair in pairs:
                for source, target, length in pair.blocks(job.runs):
                    assert np.array_equal(
                        self.link.target(job.session)[target : target + length],
                        self.link.source[source : source + length],
                    ), "announced before it arrived"
        self.layers[id(job)] = self.layers.get(id(job), 0) + layers.layers

    def on_group_done(self, group: Group, now_s: float) -> None:
        pass

    def on_failed(self, job: Job, reason: str, *, by_peer: bool) -> None:
        self.failed[job.room] = reason

    def on_done(self, job: Job) -> None:
        assert job not in self.finished and job.in_flight == 0
        self.finished.append(job)

    def on_tick(self) -> None:
        pass


def announcement(layers: LayerRange) -> Landed:
    job = layers.job
    place = layers.first_layer, layers.layers, job.first_page, job.pages
    return Landed(job.room, 0, 0, *place, [], job.attempt)


def job(room: int, session: str, pages: list[int], gate: LayerGate, *, last: bool) -> Job:
    """Pages go to the mirror position, so that runs break."""
    source = np.array(pages, dtype=np.int32)
    target = np.array([PAGES - 1 - p if p % 3 else p for p in pages], dtype=np.int32)
    size = PAGES * PAGE_BYTES
    addresses = tuple(buffer * size for buffer in range(2 * LAYERS))
    slices = slice_pairs(
        Buffers(addresses, (PAGE_BYTES,) * 2 * LAYERS), addresses, prefill=(0, 1), decode=(0, 1)
    )
    at = 2 * LAYERS * size + room * METADATA_BYTES
    metadata = [(at, at, METADATA_BYTES)] if last else []
    runs = page_runs(source, target)
    return Job(room, session, 0, runs, slices, gate, metadata=metadata, last=last)


def drive(thread: SendThread, gates: list[LayerGate], rng: random.Random) -> None:
    """Steps between events, as the running thread would make them."""
    pending = [(gate, layer) for gate in gates for layer in range(LAYERS)]
    for _ in range(20000):
        if pending and rng.random() < 0.3:
            gate = rng.choice([g for g, _ in pending])
            layer = next(layer for g, layer in pending if g is gate)
            pending.remove((gate, layer))
            gate.advance(layer)
            if layer == LAYERS - 1:
                gate.finish()
        progressed = thread.step()
        for peer in thread.peers.values():
            assert len(peer.window) <= WINDOW
        if not progressed and not pending and not any(p.window for p in thread.peers.values()):
            return
    raise AssertionError("the thread never came to rest")


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.booleans(), st.sampled_from([None, 1, 4]))
def test_everything_arrives_in_order_or_fails_alone(
    seed: int, rooms: int, one_dies: bool, fixed: int | None
) -> None:
    rng = random.Random(seed)
    link = SimulatedLink(rng, dead=["b"] if one_dies else [])
    listener = Recorder(link)
    thread = SendThread(link, listener, GroupSizer(fixed))
    gates, jobs = [], []
    for room in range(rooms):
        session = rng.choice("ab")
        count = rng.randrange(1, PAGES)
        pages = sorted(rng.sample(range(PAGES), count))
        gate = LayerGate(LAYERS)
        gates.append(gate)
        cut = rng.randrange(count)
        first, second = pages[:cut], pages[cut:]
        if first:
            jobs.append(job(room, session, first, LayerGate.open(LAYERS), last=False))
        jobs.append(job(room, session, second, gate, last=True))
    for one in jobs:
        thread.put(one)
    if rooms > 1 and rng.random() < 0.3:
        listener.aborted.add(rng.randrange(rooms))
    drive(thread, gates, rng)
    assert set(map(id, listener.finished)) == set(map(id, jobs))
    for one in jobs:
        lost = one.room in listener.aborted or one.session in link.dead
        assert lost or listener.layers.get(id(one), 0) == LAYERS
        assert (one.room in listener.failed) <= (one.session in link.dead)
        if lost or not one.last:
            continue
        for at, to, size in one.metadata:
            assert np.array_equal(
                link.target(one.session)[to : to + size], link.source[at : at + size]
            )
    assert not link.running, "writes were started and forgotten"


def test_a_failed_forward_fails_its_requests_and_no_others(seed: int) -> None:
    rng = random.Random(seed)
    link = SimulatedLink(rng)
    listener = Recorder(link)
    thread = SendThread(link, listener, GroupSizer())
    broken, whole = LayerGate(LAYERS), LayerGate(LAYERS)
    doomed, fine = job(1, "a", [1, 2], broken, last=False), job(2, "a", [5], whole, last=True)
    thread.put(doomed)
    thread.put(fine)
    broken.advance(1)
    thread.step()
    broken.fail("the forward pass failed: out of memory")
    drive(thread, [whole], rng)
    assert listener.failed == {1: "the forward pass failed: out of memory"}
    assert {one.room for one in listener.finished} == {1, 2}


def test_what_is_sent_again_leaves_in_one_piece(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode knows a range by where it begins."""
    link = SimulatedLink(random.Random(seed))
    listener = Recorder(link)
    thread = SendThread(link, listener, GroupSizer())
    jobs = [job(room, "a", [1, 2, 5], LayerGate.open(LAYERS), last=True) for room in range(2)]
    jobs[1].attempt = 1
    monkeypatch.setattr(send_thread, "MAX_GROUP_BYTES", jobs[0].layer_bytes * (LAYERS + 2))
    for one in jobs:
        thread.put(one)
    thread.step()
    groups = [[(r.job.room, r.layers) for r in each.ranges] for each in thread.peers["a"].window]
    assert groups == [[(0, LAYERS)], [(1, LAYERS)]]


def test_a_failed_write_is_not_tried_again(seed: int) -> None:
    """The first try may land at any time, also after decode has verified the second."""
    link = SimulatedLink(random.Random(seed), fail_first=1)
    listener = Recorder(link)
    thread = SendThread(link, listener, GroupSizer())
    thread.put(job(1, "a", [1, 2, 5], LayerGate.open(LAYERS), last=True))
    drive(thread, [], link.rng)
    assert len(listener.finished) == 1
    assert listener.failed == {1: "a write to decode server a failed"}
    assert set(link.tries.values()) == {1}


def test_an_address_that_is_none_fails_its_request(seed: int) -> None:
    class Strict(SimulatedLink):
        def submit(self, session: str, source: int, target: int, length: int) -> int:
            if session == "a":
                raise TypeError("incompatible function arguments")
            return super().submit(session, source, target, length)

    link = Strict(random.Random(seed))
    listener = Recorder(link)
    thread = SendThread(link, listener, GroupSizer())
    for room, session in enumerate("ab"):
        thread.put(job(room, session, [1, 2, 5], LayerGate.open(LAYERS), last=True))
    drive(thread, [], link.rng)
    assert listener.failed == {0: "a write to decode server a failed"}
    assert {one.room for one in listener.finished} == {0, 1}


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_no_peer_has_more_writes_than_its_queue_takes(seed: int, most: int) -> None:
    """Also where one layer of one request needs more."""
    rng = random.Random(seed)
    link = SimulatedLink(rng)
    listener = Recorder(link)
    thread = SendThread(link, listener, GroupSizer())
    jobs = [
        job(room, "a", rng.sample(range(PAGES), 12), LayerGate.open(LAYERS), last=True)
        for room in range(3)
    ]
    for one in jobs:
        thread.put(one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(send_thread, "MAX_WRITES", most)
        for _ in range(20000):
            thread.step()
            assert len(link.running) <= most
            if len(listener.finished) == len(jobs):
                break
    assert all(listener.layers[id(one)] == LAYERS for one in jobs)


class Wedged(SimulatedLink):
    wedged = True

    def check(self, handle: int) -> int:
        if self.wedged and self.running[handle][0] == "a":
            return 0
        return super().check(handle)


def test_the_oldest_write_and_stuck_peers_are_known(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are on the wire, after they were given up too, and no longer."""
    link = Wedged(random.Random(seed))
    listener = Recorder(link)
    thread = SendThread(link, listener, GroupSizer(1))
    assert (thread.oldest_write_s(), thread.stuck_peers()) == (0.0, 0)
    jobs = [
        job(room, session, [1, 2, 5], LayerGate.open(LAYERS), last=True)
        for room, session in enumerate("ab")
    ]
    for one in jobs:
        thread.put(one)
    while jobs[1] not in listener.finished:
        thread.step()
    began = thread.peers["a"].window[0].started_s
    monkeypatch.setattr(send_thread.time, "perf_counter", lambda: began + 40.0)
    assert (thread.oldest_write_s(), thread.stuck_peers()) == (40.0, 0)
    monkeypatch.setattr(send_thread, "SLOW_S", -1.0)
    assert thread.stuck_peers() == 1
    monkeypatch.setattr(send_thread, "STUCK_S", -1.0)
    thread.step()
    assert thread.peers["a"].stuck and not thread.peers["a"].window
    assert (thread.oldest_write_s(), thread.stuck_peers()) == (40.0, 1)
    link.wedged = False
    while len(listener.finished) < len(jobs):
        thread.step()
    assert (thread.oldest_write_s(), thread.stuck_peers()) == (0.0, 0)


def test_writes_that_never_end_fail_their_peers_requests(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keep them from being drained until they end after all."""
    link = Wedged(random.Random(seed))
    listener = Recorder(link)
    thread = SendThread(link, listener, GroupSizer(1))
    jobs = [
        job(room, session, [1, 2, 5], LayerGate.open(LAYERS), last=True)
        for room, session in enumerate("aaab")
    ]
    for one in jobs:
        thread.put(one)
    monkeypatch.setattr(send_thread, "STUCK_S", 1e9)
    while jobs[3] not in listener.finished:
        thread.step()
    assert not listener.failed
    monkeypatch.setattr(send_thread, "STUCK_S", -1.0)
    thread.step()
    assert listener.failed.keys() == {0, 1, 2} and "have not ended" in listener.failed[0]
    on_the_wire = [one for one in jobs[:3] if one.in_flight]
    assert on_the_wire and not set(map(id, on_the_wire)) & set(map(id, listener.finished))
    link.wedged = False
    while len(listener.finished) < len(jobs):
        thread.step()
    assert not link.running and thread.peers["a"].writes == 0


@pytest.mark.parametrize(
    ("pages", "size", "peer_is_gone"),
    [(PAGES, 1 << 16, False), (PAGES, 1 << 16, True), (3 * MAX_WRITES, 1 << 10, False)],
)
def test_real_engines(seed: int, pages: int, size: int, peer_is_gone: bool) -> None:
    """Layers travel between two Mooncake engines while a gate opens; then to one that is gone;
    then more scattered pages than Mooncake's queue takes writes."""
    from mooncake.engine import TransferEngine

    engines = [TransferEngine() for _ in range(2)]
    for engine in engines:
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 256, (2 * LAYERS, pages, size), dtype=np.uint8)
    target = np.zeros_like(source)
    for engine, memory in zip(engines, (source, target), strict=True):
        assert engine.register_memory(memory.ctypes.data, memory.nbytes) == 0
    session = "127.0.0.1:1" if peer_is_gone else f"127.0.0.1:{engines[1].get_rpc_port()}"
    ours, theirs = (
        tuple(int(buffer.ctypes.data) for buffer in memory) for memory in (source, target)
    )
    slices = slice_pairs(Buffers(ours, (size,) * 2 * LAYERS), theirs, prefill=(0, 1), decode=(0, 1))
    order = rng.permutation(pages).astype(np.int32)

    class Listener(Recorder):
        done = threading.Event()

        def on_acked(self, layers: LayerRange) -> None:
            self.layers[layers.job.room] = self.layers.get(layers.job.room, 0) + layers.layers

        def on_done(self, job: Job) -> None:
            super().on_done(job)
            self.done.set()

    listener = Listener(SimulatedLink(random.Random(seed)))
    listener.done.clear()
    thread = SendThread(MooncakeLink(engines[0]), listener, GroupSizer())
    gate = LayerGate(LAYERS, thread.wake)
    thread.start()
    runs = page_runs(np.arange(pages, dtype=np.int32), order)
    thread.put(Job(7, session, 0, runs, slices, gate, last=True))
    for layer in range(LAYERS):
        gate.advance(layer)
    gate.finish()
    assert listener.done.wait(600)
    if peer_is_gone:
        assert "127.0.0.1:1 failed" in listener.failed[7]
    else:
        assert listener.layers == {7: LAYERS} and not listener.failed
        assert np.array_equal(target[:, order], source)
