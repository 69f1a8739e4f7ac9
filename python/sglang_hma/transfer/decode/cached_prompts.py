"""What decode's prefix cache keeps (--disaggregation-decode-enable-radix-cache).

A finished request leaves two kinds of pages: BFP8 ones of its prompt, as prefill sent them, and
BF16 ones of what decode generated with its own weights. In the next turn of a conversation the
second kind is part of the prompt, where prefill would send its own BFP8 pages instead. With
`--hma-decode-cache prompt` only what prefill sent is kept, so that a hit holds what would have
been sent.
"""

from collections.abc import Callable
from typing import Any

from hma_kernels.layout import PAGE

COMPUTED_HERE = "hma_computed_here"


def checkpoint(
    original: Callable[..., None], cache: Any, req: Any, *, up_to: int, **kwargs: Any
) -> None:
    """Around UnifiedRadixCache.checkpoint: `up_to` ends with the pages that prefill sent."""
    if getattr(req, COMPUTED_HERE, False):
        up_to = min(up_to, req.kv.cache_protected_len)
    else:
        up_to = min(up_to, len(req.origin_input_ids) // PAGE * PAGE)
    original(cache, req, up_to=up_to, **kwargs)
