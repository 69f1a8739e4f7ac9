"""Pages are handed out, returned and committed without waiting for a GPU."""

import random

import numpy as np
import pytest
import torch

from hma_kernels import PAGE
from sglang_hma.kvcache import held_pages
from sglang_hma.kvcache.allocator import SlabPageAllocator
from sglang_hma.kvcache.pool import MixedKVPool

from .pretend_device import DEVICE, OnDevice, pretend_device

SLABS = 6


class PassedEvent:
    def record(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        raise AssertionError("the host waits for an event")


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> SlabPageAllocator:
    """Its pages are on the CPU, its slots and the formats of slabs on the device."""
    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"decode"}')
    monkeypatch.setattr(held_pages, "make_event", PassedEvent)
    size, layout = SLABS * 1024, {"dtype": torch.float32, "page_size": PAGE}
    shape = {"head_num": 1, "head_dim": 32, "layer_num": 1, "enable_memory_saver": False}
    pool = MixedKVPool(size=size, device="cpu", **layout, **shape)
    made = SlabPageAllocator(size, device="cpu", kvcache=pool, need_sort=True, **layout)
    pool.slab_is_bf16 = OnDevice(pool.slab_is_bf16)
    made.device = DEVICE.type
    return made


def test_waiting_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = OnDevice(torch.arange(6))
    with pretend_device(monkeypatch.setattr) as device:
        assert isinstance(x * 2 + 1, OnDevice) and x.device == DEVICE
        assert isinstance(torch.zeros(3, device=DEVICE), OnDevice)
        x[torch.tensor([1])] = 7
        torch.arange(3).to(DEVICE, non_blocking=True)
        assert not device.waits
        for waiting in (
            lambda: int(x[0]),
            lambda: bool((x > 3).any()),
            lambda: x[x > 3],
            lambda: x.nonzero(),
            lambda: x.cpu(),
            lambda: torch.unique(x),
            lambda: torch.repeat_interleave(x, x),
        ):
            device.waits.clear()
            waiting()
            assert device.waits, waiting
        for method in (x.tolist, x.numpy):
            with pytest.raises(AssertionError, match="waits"):
                method()


def test_pages_are_handed_out_and_returned_without_waiting(
    allocator: SlabPageAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with pretend_device(monkeypatch.setattr) as device:
        for _ in range(60):
            one_request(allocator, rng)
        # SGLang's own `free` sorts out the pages of slots: that waits.
        assert {name for name in device.waits if "unique" not in name} == set()
    assert allocator.available_size() == allocator.size


def one_request(allocator: SlabPageAllocator, rng: random.Random) -> None:
    """Comes over the wire, generates and ends, or is computed here in two chunks."""
    prompt = rng.randrange(1, 20 * PAGE)
    if rng.random() < 0.5:
        host = allocator.alloc_landing(prompt, prompt)
        assert host is not None
        slots = allocator.to_device(host)
        pages = (host[::PAGE] // PAGE).numpy().astype(np.int32)
        allocator.transfer_pages(pages)
        allocator.commit_landing(int(pages[-1]))
    else:
        ends, none = torch.tensor([prompt]), torch.tensor([0])
        made = allocator.alloc_extend(
            *(none.to(DEVICE), none, ends.to(DEVICE), ends, torch.tensor([-1]).to(DEVICE), prompt)
        )
        assert made is not None
        slots = made
    last = slots[-1:]
    for length in range(prompt + 1, prompt + 1 + rng.randrange(40)):
        lens = torch.tensor([length])
        new = allocator.alloc_decode(lens.to(DEVICE, non_blocking=True), lens, last)
        assert new is not None and isinstance(new, OnDevice)
        slots, last = torch.cat([slots, new]), new
    assert allocator.available_size() < allocator.size
    allocator.free(slots)
