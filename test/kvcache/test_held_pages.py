"""Overlap scheduling: no page that a peer may write to is still used by the device.

The loop is SGLang's event_loop_overlap_disagg_decode over a real allocator; the device is a queue
of work that runs whenever hypothesis says so. A step that was launched before the previous one's
result was looked at runs once more for a request that has ended.
"""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hma_kernels import PAGE
from sglang_hma.kvcache.allocator import SlabPageAllocator
from sglang_hma.kvcache.held_pages import Fence, NoFence
from sglang_hma.kvcache.pool import MixedKVPool


@pytest.fixture(autouse=True)
def decode_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"decode"}')


class Device:
    """Work in the order in which it was enqueued; each piece is the pages that it uses."""

    def __init__(self) -> None:
        self.work: list[set[int]] = []
        self.done = 0

    def enqueue(self, pages: set[int]) -> None:
        self.work.append(pages)

    def run(self, until: int) -> None:
        self.done = max(self.done, min(until, len(self.work)))

    def in_use(self) -> set[int]:
        return set().union(*self.work[self.done :])


class DeviceFence:
    def __init__(self, device: Device) -> None:
        self._device, self._at = device, len(device.work)

    def passed(self) -> bool:
        return self._device.done >= self._at

    def wait(self) -> None:
        self._device.run(self._at)


class OnDevice(SlabPageAllocator):
    """Its pages are used by `queue`."""

    queue: Device

    def fence(self) -> Fence:
        return DeviceFence(self.queue)


class WithoutHoldBack(OnDevice):
    def fence(self) -> Fence:
        return NoFence()


@dataclass
class Request:
    slots: list[int]
    prompt: int
    incoming: set[int]  # pages that its peer may still write to
    ends: bool = False  # says the result of the last step that was launched

    @property
    def pages(self) -> set[int]:
        return {slot // PAGE for slot in self.slots}


@dataclass
class Loop:
    """Decode's scheduler."""

    allocator: OnDevice
    device: Device = field(default_factory=Device)
    arriving: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    launched: list[Request] = field(default_factory=list)  # in the step whose result is unknown

    @classmethod
    def over(cls, slabs: int, kind: type[OnDevice]) -> "Loop":
        size, layout = slabs * 1024, {"dtype": torch.float32, "page_size": PAGE, "device": "cpu"}
        shape = {"head_num": 1, "head_dim": 32, "layer_num": 1, "enable_memory_saver": False}
        pool = MixedKVPool(size=size, **layout, **shape)
        kind.queue = device = Device()
        return cls(kind(size, **layout, kvcache=pool, need_sort=True), device)

    def arrive(self, prompt: int) -> bool:
        if not self.allocator.fits_landing(prompt, prompt):
            return False
        slots = self.allocator.alloc_landing(prompt, prompt)
        assert slots is not None
        pages = (slots[::PAGE] // PAGE).numpy().astype("int32")
        incoming = set(self.allocator.transfer_pages(pages).tolist())
        self.arriving.append(Request(slots.tolist(), prompt, incoming))
        self.check()
        return True

    def land(self, request: Request) -> None:
        """All of it has come; the landing page is unpacked by the device."""
        self.arriving.remove(request)
        if request.prompt % PAGE:
            self.device.enqueue({request.slots[-1] // PAGE} | request.incoming)
            self.allocator.commit_landing(request.slots[-1] // PAGE)
        request.incoming = set()
        self.running.append(request)

    def fail(self, request: Request) -> None:
        """Its peer has said that no write is on its way."""
        self.arriving.remove(request)
        self.allocator.free(torch.tensor(request.slots))

    def turn(self, ending: set[int]) -> bool:
        """One turn: a step is launched, then the result of the one before is looked at. `ending`:
        which of the requests in this step get their last token by it."""
        lengths = torch.tensor([len(r.slots) + 1 for r in self.running], dtype=torch.int64)
        last = torch.tensor([r.slots[-1] for r in self.running], dtype=torch.int64)
        if self.running:
            slots = self.allocator.alloc_decode(lengths, lengths, last)
            if slots is None:
                return False
            for request, slot in zip(self.running, slots.tolist(), strict=True):
                request.slots.append(slot)
            self.device.enqueue(set().union(*(r.pages for r in self.running)))
        before, self.launched = self.launched, list(self.running)
        for request in [r for r in before if r.ends]:
            self.running.remove(request)
            self.launched.remove(request)
            self.allocator.free_segment(torch.tensor(request.slots), start_pos=0)
        for index, request in enumerate(self.launched):
            request.ends = index in ending
        return True

    def check(self) -> None:
        wanted: set[int] = set().union(*(r.incoming for r in self.arriving))
        assert not wanted & self.device.in_use(), "a peer may write to a page that is in use"


class OverlapMachine(RuleBasedStateMachine):
    kind: type[OnDevice] = OnDevice

    @initialize(slabs=st.integers(1, 3))
    def start(self, slabs: int) -> None:
        self.loop = Loop.over(slabs, self.kind)

    @rule(prompt=st.integers(1, 700))
    def arrive(self, prompt: int) -> None:
        self.loop.arrive(prompt)

    @precondition(lambda self: self.loop.arriving)
    @rule(data=st.data(), whole=st.booleans())
    def transfer_ends(self, data: st.DataObject, whole: bool) -> None:
        request = data.draw(st.sampled_from(self.loop.arriving))
        (self.loop.land if whole else self.loop.fail)(request)

    @precondition(lambda self: self.loop.running or self.loop.launched)
    @rule(ending=st.sets(st.integers(0, 4)))
    def turn(self, ending: set[int]) -> None:
        self.loop.turn(ending)

    @rule(pieces=st.integers(1, 3))
    def device_runs(self, pieces: int) -> None:
        self.loop.device.run(self.loop.device.done + pieces)

    @invariant()
    def peers_write_where_nobody_looks(self) -> None:
        self.loop.check()

    @invariant()
    def pages_have_one_owner_or_are_free(self) -> None:
        owned = [r.pages for r in (*self.loop.arriving, *self.loop.running)]
        assert len(set().union(*owned)) == sum(map(len, owned))
        assert self.loop.allocator.live_tokens() == sum(map(len, owned)) * PAGE

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        loop = self.loop
        for request in list(loop.arriving):
            loop.fail(request)
        for request in loop.running:
            loop.allocator.free(torch.tensor(request.slots))
        loop.device.run(len(loop.device.work))
        assert loop.allocator.available_size() == loop.allocator.size
        assert loop.allocator.arena.live_pages == 0 and not loop.allocator.landing


TestOverlap = OverlapMachine.TestCase
TestOverlap.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Careless(OverlapMachine):
    kind = WithoutHoldBack


def test_the_machine_notices_a_missing_hold_back() -> None:
    found = settings(
        max_examples=500,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError, match="a peer may write to a page that is in use"):
        run_state_machine_as_test(Careless, settings=found)


def one_request_ends(kind: type[OnDevice]) -> Loop:
    """Its pages are back, and the step that runs once more for it is still on its way."""
    loop = Loop.over(2, kind)
    assert loop.arrive(17 * PAGE)
    loop.land(loop.arriving[0])
    assert loop.turn({0}) and loop.turn(set())
    assert not loop.running and loop.device.done == 0
    return loop


def test_an_ended_request_s_pages_wait_for_its_last_step() -> None:
    loop = one_request_ends(OnDevice)
    assert not loop.arrive(20 * PAGE)  # most of the pages are in use
    loop.device.run(len(loop.device.work))
    assert loop.arrive(20 * PAGE)


def test_without_the_hold_back_a_peer_would_write_to_them() -> None:
    with pytest.raises(AssertionError, match="a peer may write to a page that is in use"):
        one_request_ends(WithoutHoldBack).arrive(20 * PAGE)


def test_a_landed_page_waits_until_it_is_unpacked() -> None:
    loop = Loop.over(2, OnDevice)
    assert loop.arrive(40)
    landing = loop.arriving[0].incoming & set(loop.allocator.landing.values())
    loop.land(loop.arriving[0])
    assert loop.allocator.arena.live_pages == 3 and loop.allocator.live_tokens() == 2 * PAGE
    assert loop.arrive(40) and not landing & loop.arriving[0].incoming
    loop.device.run(1)
    assert loop.allocator.live_tokens() == 4 * PAGE
    assert loop.allocator.arena.live_pages == 5  # with the other's landing page


def test_generation_waits_for_pages_rather_than_fail() -> None:
    """What the device uses is enough for the next step once the device has gone on."""
    loop = Loop.over(1, OnDevice)
    for _ in range(2):
        slots = [loop.allocator.alloc_decode(*[torch.tensor([33])] * 2, torch.tensor([-1]))]
        while (
            more := loop.allocator.alloc_decode(*[torch.tensor([33])] * 2, slots[0])
        ) is not None:
            slots.append(more)
        assert len(slots) == 17
        loop.device.enqueue({int(slot) // PAGE for slot in slots})
        loop.allocator.free(torch.cat(slots))
        assert loop.allocator.check_decode_capacity(num_tokens=17 * PAGE, tree_cache=None)
        assert loop.device.done == len(loop.device.work)


def test_ranks_of_one_server_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks its own device, which may lag: what is free must not depend on that."""
    free = []
    for lag in (0, 3):
        loop = Loop.over(2, OnDevice)
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
        slots = loop.allocator.alloc(5 * PAGE)
        assert slots is not None
        for _ in range(3):
            loop.device.enqueue({int(slots[0]) // PAGE})
        loop.device.run(3 - lag)
        loop.allocator.free(slots)
        free.append(loop.allocator.available_size())
    assert free[0] == free[1] == loop.allocator.size
