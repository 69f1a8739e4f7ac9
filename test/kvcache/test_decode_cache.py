"""Decode's prefix cache over the slab arena: SGLang's own tree, queue and releases; every page has
one owner, and holds the K and V of the tokens that lead to its end."""

import os
import random
from array import array
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sglang.srt.disaggregation.decode import DecodeReqToTokenPool
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, release_req
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.common import (
    checkpoint_kv_cache,
    release_kv_cache,
    restore_kv_cache,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from hma_kernels import PAGE
from hma_kernels.layout import bf16_index
from sglang_hma.config import CONFIG_ENV, HmaConfig
from sglang_hma.transfer.decode.queues import HmaDecodePreallocQueue

from .prefill_loop import TP_WORKER, configured, radix_cache
from .test_allocator import make

ROWS = 12
SLABS = 2
BACKUP = "cpu_tensor"
PLENTY = 1 << 40


@pytest.fixture(scope="module", autouse=True)
def sglang_configured() -> Iterator[None]:
    arguments = {
        "disaggregation_decode_enable_radix_cache": True,
        "disaggregation_decode_retraction_backup": BACKUP,
    }
    with pytest.MonkeyPatch.context() as patch, configured("decode", **arguments):
        patch.setitem(os.environ, CONFIG_ENV, HmaConfig(role="decode").environment()[CONFIG_ENV])
        yield


class Decode:
    """The parts of a decode server that own pages."""

    def __init__(self) -> None:
        self.allocator = make(SLABS)
        self.pool = self.allocator.get_kvcache()
        self.rows = DecodeReqToTokenPool(ROWS, 4096, "cpu", False, 0)
        self.tree = radix_cache(self.rows, self.allocator)
        self.scheduler = SimpleNamespace(
            running_batch=SimpleNamespace(is_empty=lambda: not self.running, reqs=[]),
            waiting_queue=[],
            enable_decode_hicache=False,
            enable_hisparse=False,
            tp_worker=TP_WORKER,
        )
        self.running: list[Req] = []
        queue = self.queue = object.__new__(HmaDecodePreallocQueue)
        queue.scheduler, queue.tree_cache = self.scheduler, self.tree
        queue.token_to_kv_pool_allocator, queue.req_to_token_pool = self.allocator, self.rows
        queue.short = SimpleNamespace(lack_pages=False)
        queue.transfer_queue = SimpleNamespace(queue=[])
        queue._room_to_go_on, queue._without_cache = 0, ""
        queue._candidate, queue._candidate_prefix = None, 0
        queue.num_reserved_decode_tokens = 0
        queue._uses_swa_tail_prealloc = lambda: False

    def admit(self, req: Req) -> bool:
        """As SGLang reserves pages, with a budget of tokens that is never the limit."""
        match = self.queue._match_prefix_and_lock(req)
        prefix = match.l1_prefix_len
        self.queue._required_admission_tokens(req, 0, prefix, 0)
        if not self._fits():
            if prefix:
                self.tree.unlock(req.lock)
                req.lock = None
            return False
        self.queue._pre_alloc(req, match.prefix_indices, prefix, prefix)
        req.kv.cache_protected_len = prefix
        return True

    def resume(self, req: Req) -> bool:
        self.queue._prealloc_required_tokens(req)
        if not self._fits():
            return False
        req.is_retracted = False
        self.queue._pre_alloc(req)
        restore_kv_cache(req, self.tree, self.rows, self.allocator, BACKUP)
        req.last_node = self.tree.root_node_handle(req.extra_key)
        return True

    def _fits(self) -> bool:
        budget = {"full_allocatable_tokens": PLENTY, "swa_allocatable_tokens": None}
        return self.queue._prealloc_reservation_fits(0, 0, **budget)

    def put_aside(self, req: Req) -> None:
        assert release_req(
            req=req,
            remaing_req_count=0,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            hisparse_coordinator=None,
        )

    def pages(self, req: Req) -> torch.Tensor:
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        return row[: req.kv.kv_allocated_len : PAGE].long() // PAGE

    def mark(self, tokens: list[int], pages: torch.Tensor, begin: int, end: int) -> None:
        """Pages begin..end of a request get bytes that tell which tokens lead to their end."""
        for place in range(begin, end):
            self._bytes(pages[place]).fill_(sign(tokens[: (place + 1) * PAGE]))

    def read(self, page: torch.Tensor) -> set[int]:
        return set(self._bytes(page).flatten().tolist())

    def _bytes(self, page: torch.Tensor) -> torch.Tensor:
        if bool(self.pool.formats_of(page[None] * PAGE)[0]):
            return self.pool.kv.k_bf16[1][bf16_index(page)].view(torch.uint8)
        return self.pool.k_buffer[1][page]


def sign(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 251


class DecodeCacheMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.decode = Decode()
        self.count = 0
        self.landing: list[Req] = []
        self.aside: list[Req] = []
        self.said: list[list[int]] = [[]]  # conversations so far

    @property
    def running(self) -> list[Req]:
        return self.decode.running

    def tokens(self, req: Req) -> list[int]:
        return [*req.origin_input_ids, *req.output_ids]

    @precondition(lambda self: len(self.landing) + len(self.running) + len(self.aside) < ROWS - 1)
    @rule(back=st.integers(0, 3), word=st.integers(0, 2), count=st.integers(1, 260))
    def turn(self, back: int, word: int, count: int) -> None:
        """Of few words, so that prompts share prefixes."""
        prompt = (self.said[-1 - min(back, len(self.said) - 1)] + [word] * count)[:800]
        req = Req(
            f"{self.count}.",
            "",
            array("q", prompt),
            SamplingParams(max_new_tokens=1 << 20),
            bootstrap_host="10.0.0.1",
            bootstrap_room=self.count,
            disagg_mode=DisaggregationMode.DECODE,
            vocab_size=100,
        )
        self.count += 1
        if self.decode.admit(req):
            prefix = req.kv.cache_protected_len
            assert prefix % PAGE == 0 and prefix < len(prompt)
            self.landing.append(req)

    @precondition(lambda self: self.landing)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        req = data.draw(st.sampled_from(self.landing))
        self.landing.remove(req)
        pages, prompt = self.decode.pages(req), list(req.origin_input_ids)
        self.decode.mark(prompt, pages, req.kv.cache_protected_len // PAGE, len(prompt) // PAGE)
        if len(prompt) % PAGE:
            self.decode.allocator.commit_landing(req.hma_last_prompt_page)
        req.output_ids.append(7)
        self._join(req)

    def _join(self, req: Req) -> None:
        """As SGLang's process_prebuilt."""
        req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids
        req.extend_end = req.kv.kv_committed_len
        checkpoint_kv_cache(req, self.decode.tree)
        self.running.append(req)

    @precondition(lambda self: self.landing)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Nothing has arrived."""
        req = data.draw(st.sampled_from(self.landing))
        self.landing.remove(req)
        release_kv_cache(req, self.decode.tree, checkpoint=False)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), steps=st.integers(1, 150))
    def generate(self, data: st.DataObject, steps: int) -> None:
        req = data.draw(st.sampled_from(self.running))
        rng = random.Random(steps)
        allocator, row = self.decode.allocator, self.decode.rows.req_to_token[req.kv.req_pool_idx]
        for _ in range(steps):
            length = req.kv.kv_committed_len
            opens = length % PAGE == 0
            if not allocator.check_decode_capacity(
                num_tokens=PAGE * opens, tree_cache=self.decode.tree
            ):
                return
            lens = torch.tensor([length + 1])
            slots = allocator.alloc_decode(lens, lens, row[length - 1 : length].long())
            assert slots is not None
            row[length] = slots[0]
            req.kv.kv_committed_len = req.kv.kv_allocated_len = length + 1
            if (length + 1) % PAGE == 0:
                place = length // PAGE
                self.decode.mark(self.tokens(req), self.decode.pages(req), place, place + 1)
            req.output_ids.append(rng.randrange(2))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        req = data.draw(st.sampled_from(self.running))
        self.running.remove(req)
        req.finished_reason = FINISH_LENGTH(len(req.output_ids))
        req.finished_len = len(req.output_ids)
        self.said.append(self.tokens(req))
        release_kv_cache(req, self.decode.tree, checkpoint=True)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def put_aside(self, data: st.DataObject) -> None:
        req = data.draw(st.sampled_from(self.running))
        self.running.remove(req)
        self.decode.put_aside(req)
        self.aside.append(req)

    @precondition(lambda self: self.aside)
    @rule()
    def go_on(self) -> None:
        if self.decode.resume(self.aside[0]):
            self._join(self.aside.pop(0))

    @invariant()
    def pages_hold_what_led_to_them(self) -> None:
        owners: dict[int, int] = {}
        for req in [*self.landing, *self.running]:
            pages, tokens = self.decode.pages(req), self.tokens(req)
            whole = req.kv.kv_committed_len if req in self.running else req.kv.cache_protected_len
            for place in range(whole // PAGE):
                expected = sign(tokens[: (place + 1) * PAGE])
                assert self.decode.read(pages[place]) == {expected}, (req.rid, place)
            for page in pages[req.kv.cache_protected_len // PAGE :].tolist():
                assert owners.setdefault(page, req.bootstrap_room) == req.bootstrap_room
        allocator, tree = self.decode.allocator, self.decode.tree
        cached = (tree.evictable_size() + tree.protected_size()) // PAGE
        assert allocator.live_tokens() // PAGE == cached + len(owners)

    def teardown(self) -> None:
        if not hasattr(self, "decode"):
            return
        for req in [*self.landing, *self.running]:
            release_kv_cache(req, self.decode.tree, checkpoint=False)
        self.decode.tree.evict(EvictParams(num_tokens=PLENTY))
        assert self.decode.allocator.arena.live_pages == 0


def test_formats_owners_and_eviction() -> None:
    steps = settings(max_examples=60, stateful_step_count=80, deadline=None)
    run_state_machine_as_test(DecodeCacheMachine, settings=steps)
