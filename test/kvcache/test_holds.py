"""Pages that are on their way are not handed out, and what SGLang counts on is there at once."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_hma.kvcache.holds import HoldingAllocator, usage_of

from .prefill_loop import PAGE, Content, PrefillLoop, configured

PAGES = 24
# What SGLang wants to be free beyond a prompt: one token to generate and, for rounding, a page.
MARGIN = PAGE + 2


@pytest.fixture(scope="module", autouse=True)
def sglang_configured() -> Iterator[None]:
    logging.disable(logging.WARNING)  # SGLang reports each request that fails
    with configured():
        yield
    logging.disable(logging.NOTSET)


def allocator() -> HoldingAllocator:
    return HoldingAllocator(
        PAGES * PAGE, PAGE, dtype=torch.uint8, device="cpu", kvcache=None, need_sort=False
    )


def pages_of(slots: torch.Tensor) -> list[int]:
    return (slots[::PAGE] // PAGE).tolist()


@given(st.randoms(use_true_random=False))
def test_no_page_is_lost_doubled_or_given_out_while_held(rng) -> None:  # type: ignore[no-untyped-def]
    made = allocator()
    owned: list[torch.Tensor] = []
    held: dict[int, list] = {}  # page -> what lets go of it
    for _ in range(60):
        step = rng.randrange(5)
        if step == 0:
            pages = rng.randrange(1, 6)
            promised = made.available_size() >= pages * PAGE
            slots = made.alloc(PAGE * pages)
            assert (slots is not None) == promised
            if slots is not None:
                assert not set(pages_of(slots)) & set(held)
                owned.append(slots)
        elif step == 1 and owned:
            page = rng.choice(pages_of(rng.choice(owned)))
            if page not in held:
                held[page] = made.hold(np.array([page]))
        elif step == 2 and owned:
            made.free(owned.pop(rng.randrange(len(owned))))
        elif step == 3 and owned:
            made.free_group_begin()
            made.free_segment(owned.pop(rng.randrange(len(owned))), start_pos=0)
            made.free_group_end()
        elif step == 4 and held:
            held.pop(rng.choice(sorted(held)))()
        mine = [page for slots in owned for page in pages_of(slots)]
        assert len(set(mine)) == len(mine)
        assert made.parked_tokens == PAGE * len(set(held) - set(mine))
        assert made.available_size() + made.parked_tokens + PAGE * len(mine) == PAGES * PAGE
        assert usage_of(made) == (len(mine) + made.parked_tokens // PAGE, PAGES)
    made.clear()
    assert made.available_size() == PAGES * PAGE and made.parked_tokens == 0


def test_only_one_request_can_hold_a_page() -> None:
    made = allocator()
    let_go = made.hold(np.array([3, 4]))
    with pytest.raises(ValueError, match=r"\[4\] are held already"):
        made.hold(np.array([4, 5]))
    let_go()
    made.hold(np.array([4, 5]))


def prompt(family: int, tokens: int) -> Content:
    """Prompts of one family begin alike."""
    return tuple(range(10_000 * family, 10_000 * family + tokens))


def promised(loop: PrefillLoop) -> int:
    """Tokens that SGLang counts on, after eviction."""
    return int(loop.allocator.available_size() + loop.tree.evictable_size())


class PrefillMachine(RuleBasedStateMachine):
    """SGLang's scheduler under pressure, with transfers that end at any moment, in any way."""

    fates = st.lists(
        st.tuples(st.integers(0, 99), st.sampled_from([KVPoll.Success, KVPoll.Failed])), max_size=3
    )

    @initialize(pages=st.integers(8, 24), chunk=st.sampled_from([2, 4]), overlap=st.booleans())
    def start(self, pages: int, chunk: int, overlap: bool) -> None:
        self.loop = PrefillLoop(pages, chunk, overlap=overlap)
        self.families = 3

    def queue_is_short(self) -> bool:
        return len(self.loop.waiting_queue) < 5

    @precondition(queue_is_short)
    @rule(
        family=st.integers(0, 2),
        tokens=st.sampled_from([1, 31, 32, 33, 64, 96, 130, 160, 224]),
        times=st.integers(1, 3),
    )
    def known_prompts(self, family: int, tokens: int, times: int) -> None:
        for _ in range(times):
            self.loop.arrive(prompt(family, min(tokens, self.loop.pages * PAGE - MARGIN)))

    @precondition(queue_is_short)
    @rule()
    def all_that_is_promised(self) -> None:
        if promised(self.loop) > MARGIN:
            self.families += 1
            self.loop.arrive(prompt(self.families, promised(self.loop) - MARGIN))

    @rule(
        prompts=st.integers(1, 4), tokens=st.sampled_from([PAGE, 2 * PAGE]), turns=st.integers(1, 9)
    )
    def cached_prompts_and_then_all_that_is_promised(
        self, prompts: int, tokens: int, turns: int
    ) -> None:
        for _ in range(2):
            self.become_idle()
            for family in range(prompts):
                self.loop.arrive(prompt(family, tokens))
        self.loop.iterate()
        self.all_that_is_promised()
        for _ in range(turns):
            self.loop.iterate()

    def end_some(self, fates: list[tuple[int, int]]) -> None:
        """As the network's threads do: what the scheduler counts on does not change by it."""
        before = promised(self.loop)
        for choice, status in fates:
            success = status == KVPoll.Success
            some = self.loop.disagg_prefill_inflight_queue if success else self.loop.live()
            if some:
                self.loop.conclude(some[choice % len(some)], status)
        assert promised(self.loop) == before

    def become_idle(self) -> None:
        for _ in range(20 * len(self.loop.reqs) + 20):
            if self.loop.idle():
                break
            self.end_some([(0, KVPoll.Success)] * 3)
            self.loop.iterate()
        assert self.loop.idle() and not self.loop.live()

    @rule(before=fates, computing=fates, launched=fates, processed=fates)
    def turn(self, before: list, computing: list, launched: list, processed: list) -> None:  # type: ignore[type-arg]
        between = iter([launched, processed])
        self.end_some(before)
        self.loop.before_layer = lambda: self.end_some(computing)
        self.loop.iterate(lambda: self.end_some(next(between)))
        self.loop.before_layer = lambda: None

    @rule()
    def quiet_turn(self) -> None:
        self.loop.iterate()

    @rule(choice=st.integers(0, 99))
    def abort(self, choice: int) -> None:
        if live := self.loop.live():
            self.loop.abort(live[choice % len(live)])

    @rule()
    def take_all_that_is_promised(self) -> None:
        size = promised(self.loop)
        self.loop.tree.evict(EvictParams(num_tokens=self.loop.tree.evictable_size()))
        slots = self.loop.allocator.alloc(size)
        assert slots is not None
        self.loop.allocator.free(slots)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        allocator, owned = self.loop.allocator, self.loop.cached_pages()
        owned += allocator.get_all_free_pages().tolist()
        for req in self.loop.reqs:
            owned += self.loop.pages_of(req)[req.kv.cache_protected_len // PAGE :]
        assert len(set(owned)) == len(owned)
        assert len(owned) + allocator.parked_tokens // PAGE == self.loop.pages

    @invariant()
    def what_is_read_is_what_was_sent(self) -> None:
        for req in self.loop.live():
            for page, content in self.loop.wire.sent[req.bootstrap_room]:
                assert self.loop.content[page] == content

    def teardown(self) -> None:
        """Everything ends, and everything is free."""
        if not hasattr(self, "loop"):
            return
        self.become_idle()
        self.loop.tree.evict(EvictParams(num_tokens=self.loop.tree.evictable_size()))
        assert self.loop.allocator.available_size() == self.loop.pages * PAGE


def test_sglang_keeps_its_promises_under_pressure() -> None:
    sizes = settings(max_examples=20, stateful_step_count=50)
    run_state_machine_as_test(PrefillMachine, settings=sizes)


@pytest.mark.parametrize("status", [KVPoll.Success, KVPoll.Failed])
def test_a_request_is_answered_while_the_next_pass_runs(status: int) -> None:
    loop = PrefillLoop(20, chunk_pages=4, overlap=False)
    first = loop.arrive(prompt(0, 3 * PAGE))
    assert loop.iterate() == [first]
    assert loop.disagg_prefill_inflight_queue == [first] and first.finished_reason is None
    answered: list[bool] = []
    loop.before_layer = lambda: loop.conclude(first, status)
    loop.after_layer = lambda: answered.append(first.finished_reason is not None)
    second = loop.arrive(prompt(1, 3 * PAGE))
    assert loop.iterate() == [second]
    assert answered == [True] and loop.disagg_prefill_inflight_queue == [second]


def test_what_waits_for_its_decode_server_is_left_to_sglang() -> None:
    loop = PrefillLoop(20, chunk_pages=4, overlap=False)
    first = loop.arrive(prompt(0, 3 * PAGE))
    loop.iterate()
    left: list[bool] = []

    def waits() -> None:
        loop.conclude(first, KVPoll.Success)
        first.pending_bootstrap = True

    def look() -> None:
        left.append(loop.disagg_prefill_inflight_queue == [first])
        first.pending_bootstrap = False

    loop.before_layer, loop.after_layer = waits, look
    loop.arrive(prompt(1, 3 * PAGE))
    loop.iterate()
    assert left == [True] and first.finished_reason is not None


def test_a_chunk_waits_for_parked_pages_and_nobody_else_does() -> None:
    """Four prompts of one cached page each: the page is computed again, and locked when the rows
    enter the cache, while the new one is still read. So the pool loses four pages that a long
    prompt, admitted in between, was going to have."""
    loop = PrefillLoop(20, chunk_pages=4)
    for family in range(4):
        loop.arrive(prompt(family, PAGE))
    while not loop.idle():
        for req in loop.disagg_prefill_inflight_queue:
            loop.conclude(req, KVPoll.Success)
        loop.iterate()
    again = [loop.arrive(prompt(family, PAGE)) for family in range(4)]
    assert loop.iterate() == again
    long = loop.arrive(prompt(9, promised(loop) - MARGIN))
    assert loop.iterate() == [long] and loop.allocator.parked_tokens == 4 * PAGE
    while promised(loop) > 0:
        assert loop.iterate() == [long]
    for _ in range(5):
        assert loop.iterate() == []
    assert loop.chunked_req is long
    # The scheduler goes on: transfers that end are seen, one after the other.
    loop.conclude(again[0], KVPoll.Success)
    loop.iterate()
    assert again[0] not in loop.live() and loop.iterate() == [long]
    loop.conclude(again[1], KVPoll.Failed)
    loop.abort(again[2])
    for _ in range(4):
        loop.iterate()
    assert long in loop.disagg_prefill_inflight_queue
    assert loop.allocator.parked_tokens == PAGE


def test_a_failure_that_another_rank_has_seen_lets_go() -> None:
    """SGLang then clears a room that is well on this rank."""
    loop = PrefillLoop(8, chunk_pages=4)
    for _ in range(2):
        req = loop.arrive(prompt(0, 2 * PAGE))
        loop.iterate()
        loop.iterate()
        assert req in loop.disagg_prefill_inflight_queue
        loop.disagg_prefill_inflight_queue.remove(req)
        parked = loop.allocator.parked_tokens
        loop.handle_inflight_transfer_failure(req)
        assert loop.allocator.parked_tokens == 0 and promised(loop) == 8 * PAGE
    assert parked == PAGE
