"""A full pool on decode: the last running request is put aside like the others, not given up.

SGLang retracts running requests until one is left, and aborts that one if it still finds no page.
But pages may be held by requests that retraction cannot reach: those whose KV is on its way, or has
landed and waits to run. They will give theirs back. So the last one is aborted only if the whole
pool is too small for it alone.

With overlap scheduling a request whose prompt was computed here is in the batch one step before its
first token is known. It could not go on from there, and room for that token was made sure of before
it began: it is put aside after all others, that is never.
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

    by_preference = batch._get_decode_retraction_order

    def retraction_order(reqs: list[Any]) -> list[int]:
        """Indices, those to keep first."""
        order: list[int] = by_preference(reqs)
        return sorted(order, key=lambda index: bool(reqs[index].output_ids))

    batch.release_req, batch._get_decode_retraction_order = release_req, retraction_order
    try:
        retracted, ratio, aborted = original(batch)
    finally:
        del batch.release_req, batch._get_decode_retraction_order
    for req in put_aside:
        req.to_finish = None
        aborted.remove(req)
    return retracted + put_aside, ratio, aborted


def _fits_alone(batch: Any, req: Any) -> bool:
    """In pages of the formats that it has now, with room for its next step."""
    allocator = batch.token_to_kv_pool_allocator
    end = len(req.origin_input_ids) + len(req.output_ids)
    slots = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : end - 1]
    formats = allocator.formats_of(slots)
    return bool(allocator.fits_again(formats, end + allocator.tokens_ahead, when_empty=True))
