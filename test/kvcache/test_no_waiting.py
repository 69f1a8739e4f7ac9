"""The scheduler's thread does not wait for a GPU where it returns, hands out and commits pages.

Tensors on the device are fake ones, which have no values: whatever would bring one to the host, and
so wait for the device, raises.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from hma_kernels import PAGE
from hma_kernels.layout import IDS_PER_SLAB
from sglang_hma.kvcache.allocator import SlabPageAllocator
from sglang_hma.kvcache.held_pages import HeldPages, NoFence

SLABS = 4
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def on_gpu(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    with FAKE:
        return torch.zeros(shape, dtype=dtype, device="cuda")


class Pool:
    """What an allocator needs of a pool on a GPU."""

    def __init__(self) -> None:
        self.slab_is_bf16 = on_gpu(SLABS + 1, dtype=torch.bool)
        self.unpacked: list[tuple[int, int]] = []

    def unpack_page(self, source: int, target: int) -> None:
        self.unpacked.append((source, target))


class Later:
    """A fence that the device has not reached."""

    def passed(self) -> bool:
        return False

    def wait(self) -> None:
        raise AssertionError("the scheduler waits for the device")


class Allocator(SlabPageAllocator):
    def fence(self) -> Any:
        return Later()

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        return on_gpu(*host.shape, dtype=host.dtype)  # pinned memory needs a driver


def with_fake_tensors(allocator_of: type[SlabPageAllocator]) -> SlabPageAllocator:
    allocator = object.__new__(allocator_of)
    allocator.size, allocator.page_size = SLABS * 1024, PAGE
    allocator.device, allocator._kvcache = "cuda", Pool()
    allocator.clear()
    return allocator


def test_decode_steps_and_commits_only_enqueue() -> None:
    allocator = with_fake_tensors(Allocator)
    slots = allocator.alloc_landing(70, 70)
    assert slots is not None and slots.device.type == "cpu"
    page = int(slots[64]) // PAGE
    source = allocator.landing[page]
    allocator.commit_landing(page)
    assert allocator._kvcache.unpacked == [(source, page)]
    last = on_gpu(2)
    for lengths in ([71, 40], [97, 33]):  # the second step opens a page for both
        got = allocator.alloc_decode(last, torch.tensor(lengths), last)
        assert got is not None and got.device.type == "cuda"


@pytest.mark.parametrize(
    "wait",
    [lambda x: x[x > 0], lambda x: x[0].item(), lambda x: x.nonzero(), lambda x: int(x.sum())],
    ids=["boolean index", "item", "nonzero", "int"],
)
def test_the_test_notices_what_waits(wait: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
        wait(on_gpu(2))


def test_held_pages_are_read_only_when_their_fence_has_passed() -> None:
    fences: list[Any] = []

    class Fence(NoFence):
        reached = False

        def passed(self) -> bool:
            return self.reached

    held = HeldPages(lambda: fences.append(Fence()) or fences[-1])
    on_their_way = torch.tensor([0, 0])
    held.hold(on_their_way)
    assert held.take() == [] and len(held) == 2
    on_their_way[:] = torch.tensor([IDS_PER_SLAB, IDS_PER_SLAB + 1])
    fences[0].reached = True
    assert held.take() == [IDS_PER_SLAB, IDS_PER_SLAB + 1] and len(held) == 0
