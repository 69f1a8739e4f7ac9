"""Before a prefill batch runs: its requests' pages are queued behind the batch's gate."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_hma.kvcache.holds import HoldingAllocator
from sglang_hma.kvcache.layer_gate import GatedPool, LayerGate


def run_batch(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any) -> Any:
    """Around Scheduler.run_batch: open a gate, let the pool complete it, end it in any case.

    Pages that a radix hit has brought are final and leave at once. The pages that
    this chunk computes leave layer by layer. A part-full last page is held back:
    SGLang sends whole pages before the forward ends, and the last send, which
    carries the first token, takes it along.
    """
    if not batch.forward_mode.is_extend() or batch.forward_mode.is_prebuilt():
        return original(scheduler, batch, *args)
    allocator = scheduler.token_to_kv_pool_allocator
    outbox = scheduler.disagg_prefill_bootstrap_queue.kv_manager.outbox
    pool = allocator.get_kvcache()
    if outbox is None or not isinstance(pool, GatedPool):
        return original(scheduler, batch, *args)
    gate = LayerGate(pool.layer_num, outbox.pump.wake)
    # Pages that cannot be held back from reuse must not leave before SGLang sends them.
    if isinstance(allocator, HoldingAllocator):
        for req in batch.reqs:
            _send_early(scheduler, req, gate)
    else:
        outbox.trace.forward(gate)
    pool.layer_gate = gate
    try:
        result = original(scheduler, batch, *args)
    except BaseException as error:
        gate.fail(f"the forward pass failed: {error!r}")
        raise
    finally:
        pool.layer_gate = None
    gate.finish()
    return result


def _send_early(scheduler: Any, req: Any, gate: LayerGate) -> None:
    sender = req.disagg_kv_sender
    if req.pending_bootstrap or not hasattr(sender, "send_early"):
        return
    allocator: HoldingAllocator = scheduler.token_to_kv_pool_allocator
    page = allocator.page_size
    end = min(req.extend_end, len(req.origin_input_ids)) // page * page
    cached = (req.prefix_len - req.host_hit_length) // page * page
    layers = allocator.get_kvcache().layer_num
    # Cached pages are locked in the cache until the request has ended, computed ones are not.
    for upto, ready, hold in ((cached, LayerGate.open(layers), None), (end, gate, allocator.hold)):
        if upto > req.start_send_idx:
            send = partial(scheduler.send_kv_chunk, req, last_chunk=False, end_idx=upto)
            sender.send_early(ready, gate, send, hold=hold)
