"""The pump over a simulated link with any timing, and over real Mooncake engines."""

import random
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.page_slices import Piece, runs
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.send_thread import (
    RETRIES,
    WINDOW,
    Job,
    MooncakeLink,
    Part,
    Pump,
    Sending,
)

LAYERS, PAGE_BYTES, PAGES = 6, 24, 40
EXTRA_BYTES = 8


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
    """An owner that writes down what it is told."""

    def __init__(self, link: SimulatedLink) -> None:
        self.link = link
        self.aborted: set[int] = set()
        self.failed: dict[int, str] = {}
        self.finished: list[Job] = []
        self.layers: dict[int, int] = {}

    def unwanted(self, room: int) -> bool:
        return room in self.aborted or room in self.failed

    def note(self, part: Part) -> object:
        return part.first_layer

    def arrived(self, part: Part) -> None:
        assert part.receipt == part.first_layer
        job = part.job
        for layer in range(part.first_layer, part.first_layer + part.layers):
            for piece in job.pieces[layer]:
                for source, target, length in piece.blocks(job.parts):
                    assert np.array_equal(
                        self.link.target(job.session)[target : target + length],
                        self.link.source[source : source + length],
                    ), "announced before it arrived"
        self.layers[id(job)] = self.layers.get(id(job), 0) + part.layers

    def sent(self, sending: Sending, now_s: float) -> None:
        pass

    def broken(self, job: Job, reason: str, *, by_peer: bool) -> None:
        self.failed[job.room] = reason

    def ended(self, job: Job) -> None:
        assert job not in self.finished and job.in_flight == 0
        self.finished.append(job)

    def idle(self) -> None:
        pass


def job(room: int, session: str, pages: list[int], gate: LayerGate, *, last: bool) -> Job:
    """Pages go to the mirror position, so that runs break."""
    source = np.array(pages, dtype=np.int32)
    target = np.array([PAGES - 1 - p if p % 3 else p for p in pages], dtype=np.int32)
    size = PAGES * PAGE_BYTES

    def piece(buffer: int) -> Piece:
        return Piece(buffer * size, PAGE_BYTES, buffer * size, PAGE_BYTES, PAGE_BYTES)

    pieces = [[piece(2 * layer), piece(2 * layer + 1)] for layer in range(LAYERS)]
    at = 2 * LAYERS * size + room * EXTRA_BYTES
    extra = [(at, at, EXTRA_BYTES)] if last else []
    return Job(room, session, 0, runs(source, target), pieces, gate, extra=extra, last=last)


def drive(pump: Pump, gates: list[LayerGate], rng: random.Random) -> None:
    """Steps of the pump between events, as its thread would make them."""
    pending = [(gate, layer) for gate in gates for layer in range(LAYERS)]
    for _ in range(20000):
        if pending and rng.random() < 0.3:
            gate = rng.choice([g for g, _ in pending])
            layer = next(layer for g, layer in pending if g is gate)
            pending.remove((gate, layer))
            gate.advance(layer)
            if layer == LAYERS - 1:
                gate.finish()
        moved = pump._step()
        for peer in pump.peers.values():
            assert len(peer.window) <= WINDOW
        if not moved and not pending and not any(p.window for p in pump.peers.values()):
            return
    raise AssertionError("the pump never came to rest")


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.booleans(), st.sampled_from([None, 1, 4]))
def test_everything_arrives_in_order_or_fails_alone(
    seed: int, rooms: int, one_dies: bool, fixed: int | None
) -> None:
    rng = random.Random(seed)
    link = SimulatedLink(rng, dead=["b"] if one_dies else [])
    owner = Recorder(link)
    pump = Pump(link, owner, GroupSizer(fixed))
    gates, jobs = [], []
    for room in range(rooms):
        session = rng.choice("ab")
        count = rng.randrange(1, PAGES)
        pages = sorted(rng.sample(range(PAGES), count))
        gate = LayerGate(LAYERS)
        gates.append(gate)
        cut = rng.randrange(count)
        first, second = pages[:cut], pages[cut:]
        parts = [job(room, session, first, LayerGate.open(LAYERS), last=False)] if first else []
        parts += [job(room, session, second, gate, last=True)]
        jobs += parts
    for one in jobs:
        pump.put(one)
    if rooms > 1 and rng.random() < 0.3:
        owner.aborted.add(rng.randrange(rooms))
    drive(pump, gates, rng)
    assert set(map(id, owner.finished)) == set(map(id, jobs))
    for one in jobs:
        lost = one.room in owner.aborted or one.session in link.dead
        assert lost or owner.layers.get(id(one), 0) == LAYERS
        assert (one.room in owner.failed) <= (one.session in link.dead)
        if lost or not one.last:
            continue
        for at, to, size in one.extra:
            assert np.array_equal(
                link.target(one.session)[to : to + size], link.source[at : at + size]
            )
    assert not link.running, "writes were started and forgotten"


def test_a_failed_forward_fails_its_requests_and_no_others(seed: int) -> None:
    rng = random.Random(seed)
    link = SimulatedLink(rng)
    owner = Recorder(link)
    pump = Pump(link, owner, GroupSizer())
    broken, whole = LayerGate(LAYERS), LayerGate(LAYERS)
    doomed, fine = job(1, "a", [1, 2], broken, last=False), job(2, "a", [5], whole, last=True)
    pump.put(doomed)
    pump.put(fine)
    broken.advance(1)
    pump._step()
    broken.fail("the forward pass failed: out of memory")
    drive(pump, [whole], rng)
    assert owner.failed == {1: "the forward pass failed: out of memory"}
    assert {one.room for one in owner.finished} == {1, 2}


@pytest.mark.parametrize("failures", [RETRIES, RETRIES + 1])
def test_writes_are_tried_again_but_not_for_ever(seed: int, failures: int) -> None:
    rng = random.Random(seed)
    link = SimulatedLink(rng, fail_first=failures)
    owner = Recorder(link)
    pump = Pump(link, owner, GroupSizer())
    pump.put(job(1, "a", [1, 2, 5], LayerGate.open(LAYERS), last=True))
    drive(pump, [], rng)
    (one,) = owner.finished
    if failures > RETRIES:
        assert owner.failed == {1: "a write to decode server a failed"}
    else:
        assert owner.layers == {id(one): LAYERS} and not owner.failed


@pytest.mark.parametrize("tear", [False, True])
def test_real_engines(seed: int, tear: bool) -> None:
    """Layers travel between two Mooncake engines while a gate opens; then to one that is gone."""
    from mooncake.engine import TransferEngine

    engines = [TransferEngine() for _ in range(2)]
    for engine in engines:
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    size = 1 << 16
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 256, (LAYERS, 2, PAGES, size), dtype=np.uint8)
    target = np.zeros_like(source)
    assert engines[0].register_memory(source.ctypes.data, source.nbytes) == 0
    assert engines[1].register_memory(target.ctypes.data, target.nbytes) == 0
    session = "127.0.0.1:1" if tear else f"127.0.0.1:{engines[1].get_rpc_port()}"
    pieces = [
        [
            Piece(source[layer, kv].ctypes.data, size, target[layer, kv].ctypes.data, size, size)
            for kv in (0, 1)
        ]
        for layer in range(LAYERS)
    ]
    order = rng.permutation(PAGES).astype(np.int32)
    gate = LayerGate(LAYERS)

    class Owner(Recorder):
        def arrived(self, part: Part) -> None:
            self.layers[part.job.room] = self.layers.get(part.job.room, 0) + part.layers

    owner = Owner(SimulatedLink(random.Random(seed)))
    pump = Pump(MooncakeLink(engines[0]), owner, GroupSizer())
    gate._wake = pump.wake
    pump.start()
    try:
        pages = np.arange(PAGES, dtype=np.int32)
        pump.put(Job(7, session, 0, runs(pages, order), pieces, gate, last=True))
        for layer in range(LAYERS):
            time.sleep(0.01)
            gate.advance(layer)
        gate.finish()
        deadline = time.monotonic() + 30
        while not owner.finished and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        pump.stop()
        pump.join(5)
    assert owner.finished
    if tear:
        assert "127.0.0.1:1 failed" in owner.failed[7]
    else:
        assert owner.layers == {7: LAYERS} and not owner.failed
        assert np.array_equal(target[:, :, order], source)
