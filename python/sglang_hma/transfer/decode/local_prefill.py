"""Short prompts are computed on decode, between its steps (transfer/short_prompts.py).

They wait in the queue of requests that have no pages yet, in their order among those. Once their
pages are free, SGLang's own scheduler of a server with both roles runs them, each prompt in one
piece: for a second one it would have to find pages again.
"""

from functools import partial
from typing import Any

from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.decode import DecodeRequest
from sglang.srt.disaggregation.utils import is_aborted

from sglang_hma.gauges import GAUGES
from sglang_hma.transfer.decode.cached_prompts import COMPUTED_HERE


class ShortPrompts:
    """Those of one HmaDecodePreallocQueue. On every rank of a server the same: they are ready when
    SGLang has asked all ranks."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._entries: list[DecodeRequest] = []
        self._ready: set[int] = set()  # ids of some of them: as long as they live here
        self._begun = 0
        self.lack_pages = False  # the oldest of all requests is one of these, and does not fit
        GAUGES.counter(
            "short_prompts_total",
            "Prompts below --hma-offload-threshold, computed on this decode server",
            self,
            lambda prompts: prompts._begun,
        )

    def add(self, entry: DecodeRequest) -> None:
        """Nobody sends its pages, so there is nothing to wait for but SGLang's other ranks."""
        self._entries.append(entry)
        self._queue.kv_manager.update_status(entry.req.bootstrap_room, KVPoll.WaitingForInput)

    def keep_from_reservation(self) -> None:
        """After SGLang has looked which requests may have pages reserved: not these."""
        if not self._entries:
            return
        queued = set(map(id, self._queue.queue))
        self._entries = [entry for entry in self._entries if id(entry) in queued]
        self._ready = {id(entry) for entry in self._entries if entry.waiting_for_input}
        for entry in self._entries:
            entry.waiting_for_input = False

    def next(self) -> list[DecodeRequest]:
        """What to compute now: its pages are free. None goes before an older request that waits
        for pages, be it one that was put aside."""
        self.lack_pages = False
        found: list[DecodeRequest] = []
        if not self._ready or self._queue.retracted_queue:
            return found
        for entry in self._queue.queue:
            if entry.waiting_for_input:
                break
            if id(entry) in self._ready and not is_aborted(entry.req):
                if not self._fit([*found, entry]):
                    self.lack_pages = not found
                    break
                found.append(entry)
        return found

    def _fit(self, entries: list[DecodeRequest]) -> bool:
        """As SGLang prices the last of them; and the pages of all."""
        queue, last = self._queue, entries[-1].req
        running = queue.scheduler.running_batch.reqs
        retractable = sum(len(req.origin_input_ids) + len(req.output_ids) for req in running)
        prompts = [len(entry.req.origin_input_ids) for entry in entries]
        taken = [queue._required_alloc_tokens(fill_len=n, prefix_len=0) for n in prompts]
        budget = queue._allocatable_token_budgets(
            retractable_tokens=retractable, extra_reserved_reqs=len(entries) - 1
        )
        required = queue._required_admission_tokens(last, taken[-1], 0, retractable)
        if required > budget - sum(taken[:-1]):
            return False
        allocator = queue.token_to_kv_pool_allocator
        return bool(
            allocator.evict_until(queue.tree_cache, partial(allocator.fits_prompts, prompts))
        )

    def note_begun(self, entries: list[DecodeRequest]) -> None:
        """They have pages of SGLang's own scheduling now."""
        if not entries:
            return
        self._begun += len(entries)
        gone = set(map(id, entries))
        self._queue.queue = [entry for entry in self._queue.queue if id(entry) not in gone]
        self._entries = [entry for entry in self._entries if id(entry) not in gone]
        self._ready -= gone
        for entry in entries:
            setattr(entry.req, COMPUTED_HERE, True)
            entry.kv_receiver.clear()
            entry.kv_receiver = None


def get_next_batch(original: Any, scheduler: Any, running_batch: Any) -> Any:
    """Around Scheduler.get_next_disagg_decode_batch_to_run."""
    short, last = scheduler.disagg_decode_prealloc_queue.short, scheduler.last_batch
    ready = short.next()
    if not ready and not (last is not None and last.forward_mode.is_extend()):
        return original(scheduler, running_batch)
    running_batch = _admit_landed(scheduler, running_batch, last)
    landed, chunk = scheduler.waiting_queue, scheduler.chunked_prefill_size
    scheduler.waiting_queue = [entry.req for entry in ready]
    scheduler.chunked_prefill_size = None
    try:
        plan = scheduler.get_next_batch_to_run(running_batch, last)
    finally:
        left, scheduler.waiting_queue = scheduler.waiting_queue, landed
        scheduler.chunked_prefill_size = chunk
    waiting = set(map(id, left))
    short.note_begun([entry for entry in ready if id(entry.req) not in waiting])
    return plan


def _admit_landed(scheduler: Any, running_batch: Any, last: Any) -> Any:
    """As SGLang's own method begins: requests whose pages have landed join the running ones. So
    will those of `last`, if their prompts have just been computed: there is room for all."""
    joining = len(last.reqs) if last is not None and last.forward_mode.is_extend() else 0
    most = scheduler.max_running_requests
    scheduler.max_running_requests = min(most, scheduler.req_to_token_pool.size) - joining
    try:
        landed = scheduler.get_new_prebuilt_batch(running_batch)
    finally:
        scheduler.max_running_requests = most
    if not landed:
        return running_batch
    scheduler.batch_result_processor.process_batch_result_prebuilt(landed)
    landed.filter_batch()
    if landed.is_empty():
        return running_batch
    if running_batch.is_empty():
        return landed
    running_batch.merge_batch(landed)
    return running_batch
