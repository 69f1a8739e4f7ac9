"""Short prompts are computed on decode, between its steps (transfer/short_prompts.py).

They wait in the queue of requests that have no pages yet, in their order among those. Once their
pages are free, SGLang's own scheduler of a server with both roles runs them, each prompt in one
piece: for a second one it would have to find pages again.
"""

from typing import Any


def get_next_batch(original: Any, scheduler: Any, running_batch: Any) -> Any:
    """Around Scheduler.get_next_disagg_decode_batch_to_run."""
    queue = scheduler.disagg_decode_prealloc_queue
    ready, last = queue.short_prompts(), scheduler.last_batch
    if not ready and not (last is not None and last.forward_mode.is_extend()):
        return original(scheduler, running_batch)
    running_batch = _admit_landed(scheduler, running_batch)
    landed, chunk = scheduler.waiting_queue, scheduler.chunked_prefill_size
    scheduler.waiting_queue = [entry.req for entry in ready]
    scheduler.chunked_prefill_size = None
    try:
        plan = scheduler.get_next_batch_to_run(running_batch, last)
    finally:
        left, scheduler.waiting_queue = scheduler.waiting_queue, landed
        scheduler.chunked_prefill_size = chunk
    waiting = set(map(id, left))
    queue.note_begun([entry for entry in ready if id(entry.req) not in waiting])
    return plan


def _admit_landed(scheduler: Any, running_batch: Any) -> Any:
    """As SGLang's own method begins: requests whose pages have landed join the running ones."""
    landed = scheduler.get_new_prebuilt_batch(running_batch)
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
