"""Decode's request queues: pages of the right format before and after the transfer.

Before it a prompt gets BFP8 pages, and prefill is told of the landing page instead of the
part-full last page. After it the landing page is unpacked into the BF16 page that the request's
own tokens continue.
"""

import dataclasses
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zmq
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.decode import (
    DecodePreallocQueue,
    DecodeRequest,
    DecodeTransferQueue,
)
from sglang.srt.disaggregation.decode_hicache_mixin import DecodePrefixMatch
from sglang.srt.disaggregation.utils import (
    FAKE_BOOTSTRAP_HOST,
    is_aborted,
    prepare_abort,
)
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from typing_extensions import override

from hma_kernels.layout import BF16_PAGES_PER_SLAB, BFP8_PAGES_PER_SLAB, PAGE
from sglang_hma.addresses import canonical_host
from sglang_hma.gauges import GAUGES
from sglang_hma.kvcache.format import WINDOW
from sglang_hma.kvcache.two_pools import TwoPoolAllocator
from sglang_hma.transfer.decode import prompt_answers
from sglang_hma.transfer.decode.local_prefill import ShortPrompts
from sglang_hma.transfer.decode.manager import control_ports
from sglang_hma.transfer.liveness import PeerLiveness
from sglang_hma.transfer.refusals import tell_of
from sglang_hma.transfer.request_fields import configured_peers, refuse_one

# Of a rank that alone decides when it goes on; SGLang's timeouts and deferred releases pass by.
WAIT_S = 20e-3
# Ranks of one server look together: none may keep the others waiting.
SHARED_POLL_S = 0.5e-3
ASK_AGAIN_S = 10.0


class HmaDecodePreallocQueue(DecodePreallocQueue):
    """Reserves pages by format; tells the peer the landing page, not the part-full last page; lets
    no request in that names a prefill server which is not one of this server's."""

    token_to_kv_pool_allocator: Any  # SlabPageAllocator or TwoPoolAllocator
    num_reserved_decode_tokens: int

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Reserved tokens become BF16 pages; budgets count BFP8 pages' tokens.
        reserved = self.num_reserved_decode_tokens * BFP8_PAGES_PER_SLAB
        self.num_reserved_decode_tokens = -(-reserved // BF16_PAGES_PER_SLAB)
        self._candidate: Any = None  # the request just priced
        self._candidate_prefix = 0  # tokens of its prompt that lie in cached pages
        self._room_to_go_on = 0  # tokens that must fit beside it
        self._without_cache = ""  # the id of a request that fits only without what is cached of it
        self._peers = configured_peers()
        self.short = ShortPrompts(self)
        # A step on its way may still use pages that are returned meanwhile.
        for pool in self.token_to_kv_pool_allocator.pools:
            pool.other_streams = lambda: (self.scheduler.forward_stream,)
            if not self.scheduler.spec_algorithm.is_none():
                pool.tokens_ahead = get_alloc_reserve_per_decode()
        if isinstance(self.token_to_kv_pool_allocator, TwoPoolAllocator):
            self.token_to_kv_pool_allocator.window = self.scheduler.sliding_window_size

    @override
    def add(self, req: Any, is_retracted: bool = False, is_rebootstrap: bool = False) -> None:
        """The tokenizer's process has refused what a client may not ask for. This is for whatever
        comes here another way: SGLang ends the scheduler on fields that it cannot work with."""
        if is_fake(req):
            req.skip_radix_cache_insert = True  # its pages hold nobody's text
        elif not (is_retracted or is_rebootstrap or is_aborted(req)):
            fields = req.bootstrap_host, req.bootstrap_port, req.bootstrap_room
            if reason := refuse_one(self._peers, *fields):
                prepare_abort(req, reason, status_code=400)
            else:
                req.bootstrap_host = canonical_host(req.bootstrap_host)
        super().add(req, is_retracted=is_retracted, is_rebootstrap=is_rebootstrap)

    @override
    def _init_receiver(self, decode_req: DecodeRequest, prefill_dp_rank: int) -> None:
        """The prefill server is known by now, and with it which prompts are too short for it. One
        that has failed has no say in its room, which may be another's."""
        receiver, manager = decode_req.kv_receiver, self.kv_manager
        if receiver.conclude_state == KVPoll.Failed:
            super()._init_receiver(decode_req, prefill_dp_rank)
            return
        address, room = receiver.bootstrap_addr, decode_req.req.bootstrap_room
        if manager.refuse_rank(room, address, prefill_dp_rank):
            return
        if manager.leaves_to_decode(address, decode_req.req):
            self.short.add(decode_req)
        else:
            super()._init_receiver(decode_req, prefill_dp_rank)

    @override
    def _update_handshake_waiters(self, *args: Any, **kwargs: Any) -> None:
        """As SGLang's; a refused prefill server is the fault of the request that named it, and no
        pages are reserved for what is computed here."""
        refused = self.kv_manager.refused
        reasons = [(entry.req, refused.get(entry.req.bootstrap_room)) for entry in self.queue]
        super()._update_handshake_waiters(*args, **kwargs)
        for req, reason in reasons:
            if reason is not None and is_aborted(req):
                prepare_abort(req, reason, status_code=400)
        self.short.keep_from_reservation()

    @override
    def _check_if_req_exceed_kv_capacity(self, req: Any) -> bool:
        prompt, end = len(req.origin_input_ids), self._pre_alloc_fill_len(req)
        allocator = self.token_to_kv_pool_allocator
        if not allocator.fits_landing(prompt, end, when_empty=True):
            message = (
                f"Request {req.rid} needs KV pages for {prompt} prompt tokens and one more; "
                f"the whole pool holds {allocator.pools[0].size} tokens. Raise --max-total-tokens."
            )
            prepare_abort(req, message, status_code=400)
            self.scheduler.output_streamer.stream_output([req], req.return_logprob)
        elif not super()._check_if_req_exceed_kv_capacity(req):
            return False
        tell_of(self.scheduler, req)
        return True

    @override
    def _build_decode_prefix_match(self, req: Any, *args: Any, **kwargs: Any) -> DecodePrefixMatch:
        """Of a prompt that is cached to its end one page travels all the same: a page list without
        pages would not show where a prompt ends."""
        found = super()._build_decode_prefix_match(req, *args, **kwargs)
        most = (len(req.origin_input_ids) - 1) // PAGE * PAGE
        if req.rid == self._without_cache:
            most = 0
        if found.l1_prefix_len <= most:
            return found
        if most == 0:  # SGLang unlocks only what it has found something of
            self.tree_cache.unlock(req.lock)
            req.lock = None
        return dataclasses.replace(found, prefix_indices=found.prefix_indices[:most])

    @override
    def _required_admission_tokens(
        self, req: Any, allocated_tokens: int, prefix_len: int, retractable_tokens: int
    ) -> int:
        self._candidate, self._candidate_prefix = req, prefix_len
        args = req, allocated_tokens, prefix_len, retractable_tokens
        return int(super()._required_admission_tokens(*args))

    @override
    def _prealloc_required_tokens(self, req: Any) -> tuple[int, int]:
        self._candidate, self._candidate_prefix = req, 0
        return super()._prealloc_required_tokens(req)

    @override
    def _prealloc_reservation_fits(self, *args: Any, **kwargs: Any) -> bool:
        """The token budget, and the pages themselves for the request just priced: cached prefixes
        are evicted until there are as many of each format."""
        if self.short.lack_pages or not super()._prealloc_reservation_fits(*args, **kwargs):
            return False
        if self.token_to_kv_pool_allocator.evict_until(self.tree_cache, self._candidate_fits):
            return True
        # Its own prefix, which it holds, may lie so that the rest has no room beside it.
        if self._candidate_prefix and self._nothing_runs() and not self.transfer_queue.queue:
            self._without_cache = self._candidate.rid
        return False

    def _candidate_fits(self) -> bool:
        req, allocator = self._candidate, self.token_to_kv_pool_allocator
        fill_len = self._pre_alloc_fill_len(req)
        end, beside = fill_len + self._room_to_go_on, self._window_reserve()
        if saved := saved_pages(req):
            formats = allocator.saved_formats(saved)
            return allocator.fits_again(formats, end + allocator.tokens_ahead, beside=beside)
        prompt, prefix = len(req.origin_input_ids), self._candidate_prefix
        return bool(allocator.fits_landing(prompt, end, prefix, beside=beside))

    def _window_reserve(self) -> int:
        """BF16 pages to leave in the window layers' pool, if there is one: what those who have
        pages may open before they free others, and no more than SGLang reserves."""
        allocator = self.token_to_kv_pool_allocator
        if not isinstance(allocator, TwoPoolAllocator):
            return 0
        active, window = self._active_req_count(), allocator.pools[WINDOW]
        grown = active * (-(-allocator.window // PAGE) + 2)
        reserved = active * -(-self.num_reserved_decode_tokens // PAGE)
        return max(0, min(reserved, grown - window.live_tokens() // PAGE))

    @override
    def _swa_tail_allocatable_token_budget(self, *args: Any, **kwargs: Any) -> int:
        """SGLang counts a request's whole answer, which the window leaves behind. `_candidate_fits`
        counts pages."""
        return 1 << 40

    @override
    def resume_retracted_reqs(self, rids_to_check: list[str] | None = None) -> list[Any]:
        """What begins before anything new is let in. If nothing runs, requests that have landed
        come first: only they can give pages back, and SGLang would let them wait as long as a
        retracted one has no room."""
        if not self.retracted_queue or not self._nothing_runs():
            return list(super().resume_retracted_reqs(rids_to_check))
        if landed := self.transfer_queue.pop_transferred():
            return list(landed)
        # With a page to go on in, or it would be retracted again at once.
        self._room_to_go_on = PAGE
        resumed: list[Any] = super().resume_retracted_reqs(rids_to_check)
        self._room_to_go_on = 0
        if resumed or self.transfer_queue.queue:
            return resumed
        # Nobody else is left, so the reserve is for nobody.
        reserved, self.num_reserved_decode_tokens = self.num_reserved_decode_tokens, 0
        resumed = super().resume_retracted_reqs([self.retracted_queue[0].rid])
        self.num_reserved_decode_tokens = reserved
        return resumed

    def _nothing_runs(self) -> bool:
        return self.scheduler.running_batch.is_empty() and not self.scheduler.waiting_queue

    @override
    def _alloc_for_decode_prealloc(
        self,
        allocator: Any,
        *,
        req: Any,
        fill_len: int,
        prefix_len: int,
        **_: Any,
    ) -> torch.Tensor | None:
        """A request that was put aside gets pages of the formats that it had: some of its prompt's
        may have been generated before, or computed here."""
        prompt = len(req.origin_input_ids)
        req.kv.kv_allocated_len = fill_len
        if saved := saved_pages(req):
            slots = allocator.alloc_again(allocator.saved_formats(saved), fill_len)
        else:
            slots = allocator.alloc_landing(prompt, fill_len, prefix_len)
        if slots is None:
            return None
        if isinstance(allocator, TwoPoolAllocator):
            req.kv.set_evicted_seqlen(ComponentType.SWA, allocator.behind_window(slots))
        req.hma_last_prompt_page = int(slots[(prompt - 1) // PAGE * PAGE - prefix_len]) // PAGE
        return allocator.to_device(slots)

    @override
    def _transfer_page_indices(
        self, decode_req: DecodeRequest, kv_indices: torch.Tensor, page_size: int
    ) -> npt.NDArray[np.int32]:
        pages = super()._transfer_page_indices(decode_req, kv_indices, page_size)
        return self.token_to_kv_pool_allocator.transfer_pages(pages)


def saved_pages(req: Any) -> Any:
    """What a request that was put aside had in its pages: what the pool's get_cpu_copy gave."""
    backup = req.kv.retraction_backup
    return backup.cpu_tensors if backup is not None else None


def is_fake(req: Any) -> bool:
    """Whether nothing is transferred for a request: SGLang's health checks and warm-up."""
    return bool(req.bootstrap_host == FAKE_BOOTSTRAP_HOST)


class HmaDecodeTransferQueue(DecodeTransferQueue):
    """Unpacks the landed last page; frees a failed request's pages when nothing can land there;
    empties the pages of a request whose prompt nobody sends."""

    _liveness = PeerLiveness()

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asked_s: dict[int, float] = {}  # when prefill was asked about a failed request
        GAUGES.gauge(
            "kv_quarantined_pages",
            "Pages of failed requests, kept until prefill says that no write is on its way",
            self,
            HmaDecodeTransferQueue.count_quarantined,
        )

    def count_quarantined(self) -> int:
        """Pages of failed requests. From any thread."""
        failed = [entry[0].req for entry in list(self._deferred_releases)]
        tokens = [len(req.origin_input_ids) - req.kv.cache_protected_len for req in failed]
        allocator = self.scheduler.token_to_kv_pool_allocator
        if isinstance(allocator, TwoPoolAllocator):
            tokens += [each - allocator.window_start(each) for each in tokens]
        return sum(-(-each // PAGE) for each in tokens)

    @override
    def _commit_transfer_to_req(self, decode_req: DecodeRequest) -> None:
        req = decode_req.req
        if is_fake(req):
            self._empty_pages(req)
        prompt_answers.commit(super()._commit_transfer_to_req, self, decode_req)
        if is_aborted(req) or len(req.origin_input_ids) % PAGE == 0:
            return
        self.scheduler.token_to_kv_pool_allocator.commit_landing(req.hma_last_prompt_page)

    def _empty_pages(self, req: Any) -> None:
        """They still hold the bytes of whoever had them before. Cached ones are not its own."""
        own = slice(req.kv.cache_protected_len, len(req.origin_input_ids), PAGE)
        slots = self.scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, own]
        self.scheduler.token_to_kv_pool_allocator.empty(slots)

    @override
    def pop_transferred(self, rids_to_check: list[str] | None = None) -> list[Any]:
        """As SGLang's; waits if there is nothing to decode either: others need the core."""
        transferred: list[Any] = super().pop_transferred(rids_to_check)
        if self.queue and not transferred and self.scheduler.running_batch.is_empty():
            self._wait()
        return transferred

    def _wait(self) -> None:
        requests = self.scheduler.recv_from_tokenizer
        if self.scheduler.tp_size > 1 or not isinstance(requests, zmq.Socket):
            time.sleep(SHARED_POLL_S)
        else:
            manager = self.scheduler.disagg_decode_prealloc_queue.kv_manager
            manager.news.wait(requests, WAIT_S)

    @override
    def resolve_deferred_releases(self) -> None:
        """Frees failed requests' pages once nothing can be written to them (quarantine.py)."""
        now = time.monotonic()
        for decode_req, *_ in self._deferred_releases:
            ended = decode_req.kv_receiver
            confirmed = ended.kv_mgr.confirmed_ranks(ended.bootstrap_room)
            ranks = [
                rank
                for index, rank in enumerate(control_ports(ended.bootstrap_infos or ()))
                if ended.prefill_rank(index) not in confirmed
            ]
            gone = [self._liveness.is_gone(rank) for rank in ranks]
            if ranks and all(gone):
                ended.kv_mgr.note_gone(ended.bootstrap_room, ranks)
            elif now - self._asked_s.setdefault(ended.bootstrap_room, now) > ASK_AGAIN_S:
                # The confirmation may have been lost, or the question.
                self._asked_s[ended.bootstrap_room] = now
                ended.kv_mgr.repeat_abort(ended.bootstrap_room, ended._abort_generation, ranks)
        super().resolve_deferred_releases()
        kept = {entry[0].req.bootstrap_room for entry in self._deferred_releases}
        self._asked_s = {room: at for room, at in self._asked_s.items() if room in kept}
