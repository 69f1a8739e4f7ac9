"""Token slots ahead of a request: BF16 pages into which its drafts' KV goes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hma_kernels.layout import PAGE
from sglang_hma.kvcache.allocator import SlabPageAllocator


def alloc_for_spec_decode(
    _: Callable[..., None],
    tree_cache: Any,
    req_to_token_pool: Any,
    *,
    reqs: Sequence[Any],
    req_pool_indices: torch.Tensor,
    cur_kv_lens: torch.Tensor,
    cur_kv_lens_cpu: torch.Tensor,
    nxt_kv_lens: torch.Tensor,
    nxt_kv_lens_cpu: torch.Tensor,
    num_needed_tokens: int,
    batch: Any = None,
) -> None:
    """In the place of SGLang's function: its slots would be a prompt's, and its Triton kernel does
    not run on a CPU. Raises RuntimeError if there are no pages, which SGLang has made sure of."""
    allocator: SlabPageAllocator = tree_cache.token_to_kv_pool_allocator
    table = req_to_token_pool.req_to_token
    spans = list(zip(cur_kv_lens_cpu.tolist(), nxt_kv_lens_cpu.tolist(), strict=True))
    rows = [req.kv.req_pool_idx for req in reqs]
    last = [
        int(table[row, start - 1]) if start % PAGE else -1
        for row, (start, _) in zip(rows, spans, strict=True)
    ]
    slots = allocator.alloc_generated(spans, last)
    if slots is None:
        raise RuntimeError(f"no BF16 pages for {num_needed_tokens} more tokens")
    counts = [end - start for start, end in spans]
    where = np.repeat(rows, counts), np.concatenate([np.arange(*span) for span in spans])
    index = tuple(allocator.to_device(torch.from_numpy(each)) for each in where)
    req_to_token_pool.write(index, slots.to(table.dtype))
    for req, (_, end) in zip(reqs, spans, strict=True):
        req.kv.kv_allocated_len = max(req.kv.kv_allocated_len, end)
