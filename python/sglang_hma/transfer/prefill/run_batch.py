"""Before a prefill batch runs, its requests' pages are queued behind the batch's layer gate."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_hma.kvcache.layer_gate import GatedPool, LayerGate
from sglang_hma.transfer.prefill.jobs import EarlySend


def run_batch(
    original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around Scheduler.run_batch: open a gate, let the pool advance it, end it in any case.

    Pages of a radix hit are final and leave at once. Pages that this chunk computes leave layer by
    layer. A part-full last page waits for the last send, which carries the first token: before
    the forward pass has ended only whole pages are sent.
    """
    if not batch.forward_mode.is_extend() or batch.forward_mode.is_prebuilt():
        return original(scheduler, batch, *args, **kwargs)
    sender = scheduler.disagg_prefill_bootstrap_queue.kv_manager.sender
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if sender is None or not isinstance(pool, GatedPool):
        return original(scheduler, batch, *args, **kwargs)
    gate = LayerGate(pool.layer_num, sender.thread.wake)
    if sender.holds is not None:
        for req in batch.reqs:
            _send_early(scheduler, req, gate)
    else:
        sender.trace.forward(gate)
    pool.layer_gate = gate
    try:
        result = original(scheduler, batch, *args, **kwargs)
    except BaseException as error:
        gate.fail(f"the forward pass failed: {error!r}")
        raise
    finally:
        pool.layer_gate = None
    gate.finish()
    return result


def _send_early(scheduler: Any, req: Any, forward: LayerGate) -> None:
    sender = req.disagg_kv_sender
    if req.pending_bootstrap or not hasattr(sender, "send_early"):
        return
    page = scheduler.token_to_kv_pool_allocator.page_size
    end = min(req.extend_end, len(req.origin_input_ids)) // page * page
    cached = (req.prefix_len - req.host_hit_length) // page * page
    for end_idx, gate in ((cached, LayerGate.open(forward.layers)), (end, forward)):
        if end_idx > req.start_send_idx:
            send = partial(scheduler.send_kv_chunk, req, last_chunk=False, end_idx=end_idx)
            sender.send_early(EarlySend(gate, forward), send)
