"""A full pool on decode: the last running request is put aside like the others, not given up.

SGLang retracts running requests until one is left, and aborts that one if it still finds no page.
But pages may be held by requests that retraction cannot reach: those whose KV is on its way, or has
landed and waits to run. They will give theirs back. So the last one is aborted only if the whole
pool is too small for it alone.
"""

from collections.abc import Callable
from typing import Any


def retract_decode(original: Callable[[Any], Any], batch: Any) -> Any:
    """Wraps ScheduleBatch.retract_decode: (retracted, new token ratio, aborted)."""
    put_aside: list[Any] = []
    release = batch.release_req

    def release_req(index: int, remaining: int, offload_kv: bool = True) -> bool:
        """SGLang saves no KV of the one that it aborts for want of memory."""
        req = batch.reqs[index]
        if offload_kv or remaining or req.beam_group is not None or not _fits_alone(batch, req):
            return bool(release(index, remaining, offload_kv))
        saved = bool(release(index, remaining))
        if saved:
            put_aside.append(req)
        return saved

    batch.release_req = release_req
    try:
        retracted, ratio, aborted = original(batch)
    finally:
        del batch.release_req
    for req in put_aside:
        req.to_finish = None
        aborted.remove(req)
    return retracted + put_aside, ratio, aborted


def _fits_alone(batch: Any, req: Any) -> bool:
    prompt, end = len(req.origin_input_ids), len(req.origin_input_ids) + len(req.output_ids)
    allocator = batch.token_to_kv_pool_allocator
    return bool(allocator.fits_landing(prompt, end, when_empty=True))
