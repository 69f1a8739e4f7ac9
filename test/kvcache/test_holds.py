"""Pages that are held while they are freed are handed out again when nobody holds them."""

import random
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.kvcache.holds import HoldingAllocator, PageHolds

PAGE, PAGES = 32, 24


def allocator() -> HoldingAllocator:
    return HoldingAllocator(
        PAGES * PAGE, PAGE, dtype=torch.uint8, device="cpu", kvcache=None, need_sort=False
    )


def pages_of(slots: torch.Tensor) -> list[int]:
    return (slots[::PAGE] // PAGE).tolist()


@given(st.integers(0, 2**32 - 1))
def test_no_page_is_lost_doubled_or_given_out_while_held(seed: int) -> None:
    rng, made = random.Random(seed), allocator()
    owned: list[torch.Tensor] = []
    held: list[list[int]] = []
    for _ in range(60):
        step = rng.randrange(5)
        if step == 0 and (slots := made.alloc(PAGE * rng.randrange(1, 6))) is not None:
            assert not set(pages_of(slots)) & {page for pages in held for page in pages}
            owned.append(slots)
        elif step == 1 and owned:
            pages = rng.sample(pages_of(rng.choice(owned)), 1)
            made.holds.hold(np.array(pages))
            held.append(pages)
        elif step == 2 and owned:
            made.free(owned.pop(rng.randrange(len(owned))))
        elif step == 3 and owned:
            made.free_group_begin()
            made.free_segment(owned.pop(rng.randrange(len(owned))), start_pos=0)
            made.free_group_end()
        elif step == 4 and held:
            made.holds.release(np.array(held.pop(rng.randrange(len(held)))))
        free = made.available_size()
        mine = [page for slots in owned for page in pages_of(slots)]
        assert len(set(mine)) == len(mine)
        assert free + made.parked_tokens + PAGE * len(mine) == PAGES * PAGE
        if not held:
            assert made.parked_tokens == 0
    made.clear()
    assert made.available_size() == PAGES * PAGE and made.parked_tokens == 0


def test_an_allocation_waits_for_pages_that_are_on_their_way() -> None:
    made = allocator()
    slots = made.alloc(PAGES * PAGE)
    made.holds.hold(np.array(pages_of(slots)[:4]))
    made.free(slots)
    assert made.available_size() == (PAGES - 4) * PAGE
    threading.Timer(0.2, made.holds.release, [np.array(pages_of(slots)[:4])]).start()
    began = time.monotonic()
    assert len(made.alloc(PAGES * PAGE)) == PAGES * PAGE
    assert time.monotonic() - began > 0.1
    assert made.alloc(PAGE) is None


def test_what_nobody_holds_cannot_be_released() -> None:
    holds = PageHolds(8)
    holds.hold(np.array([3, 3, 4]))
    holds.release(np.array([3]))
    assert holds.held(np.array([3, 4, 5])).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="5"):
        holds.release(np.array([5]))
    holds.release(np.array([4, 3]))
    assert not holds.any()
