"""Before a prefill batch runs, its requests' pages are queued behind the batch's layer gate.

While it runs, requests of earlier batches are answered as soon as their pages have arrived.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sglang_hma.kvcache.holds import HoldingAllocator
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
    allocator = scheduler.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    if sender is None or not isinstance(pool, GatedPool):
        return original(scheduler, batch, *args, **kwargs)
    gate = LayerGate(pool.layer_num, sender.thread.wake)
    # A page that is freed before it has arrived must not be handed out.
    if isinstance(allocator, HoldingAllocator):
        for req in batch.reqs:
            _send_early(scheduler, allocator, req, gate)
    else:
        sender.trace.forward(gate)
    pool.layer_gate = gate
    if _host_computes(scheduler, pool):
        pool.between_layers = partial(_answer, scheduler)
    try:
        result = original(scheduler, batch, *args, **kwargs)
    except BaseException as error:
        gate.fail(f"the forward pass failed: {error!r}")
        raise
    finally:
        pool.layer_gate = pool.between_layers = None
    gate.finish()
    return result


def _host_computes(scheduler: Any, pool: GatedPool) -> bool:
    """Whether the scheduler is busy until the forward is over, by itself. Ranks of a group would
    have to look at their queues together."""
    alone = scheduler.attn_tp_cpu_group.size() == scheduler.attn_cp_cpu_group.size() == 1
    return alone and torch.device(pool.device).type == "cpu"


def _answer(scheduler: Any) -> None:
    """What SGLang does between two passes, done between two layers.

    The router sends nothing of decode's stream to a client before prefill has answered, so the
    first token would wait for the pass of whoever comes next.
    """
    queue = scheduler.disagg_prefill_inflight_queue
    # SGLang sends the pages of those now; their gate is not this pass's.
    if not queue or any(req.pending_bootstrap for req in queue):
        return
    with torch.inference_mode(mode=False), torch.no_grad():
        scheduler.process_disagg_prefill_inflight_queue()


def _send_early(scheduler: Any, allocator: HoldingAllocator, req: Any, forward: LayerGate) -> None:
    sender = req.disagg_kv_sender
    if req.pending_bootstrap or not hasattr(sender, "send_early"):
        return
    page = allocator.page_size
    end = min(req.extend_end, len(req.origin_input_ids)) // page * page
    cached = (req.prefix_len - req.host_hit_length) // page * page
    if _computes_cached_tokens(req, page):
        end = cached
    # Cached pages are locked in the cache until the request has ended, computed ones are not.
    for end_idx, gate, hold in (
        (cached, LayerGate.open(forward.layers), None),
        (end, forward, allocator.hold),
    ):
        if end_idx > req.start_send_idx:
            send = partial(scheduler.send_kv_chunk, req, last_chunk=False, end_idx=end_idx)
            sender.send_early(EarlySend(gate, forward), send, hold=hold)


def _computes_cached_tokens(req: Any, page: int) -> bool:
    """Whether a prompt may have whole pages in the cache that it computes again, since its logprobs
    are asked for. In the cache's place they would be held until the request ends, both copies of
    them: more than the pool may have. They leave after the pass, from the cache."""
    last_page = (len(req.origin_input_ids) - 1) // page * page
    return bool(req.return_logprob and 0 <= req.logprob_start_len < last_page)
