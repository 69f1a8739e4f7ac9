"""Partial softmax states of a batch's items, and the exact sum of those of each request."""

import torch
import triton
import triton.language as tl

from hma_kernels.triton.schedule import Schedule

ITEMS_AT_ONCE = 16


@triton.jit
def _merge(
    out,
    partial,
    maxima,
    sums,
    item_start,
    HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """One request and query head, ITEMS at a time, in a fixed order."""
    request, head = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(item_start + request), tl.load(item_start + request + 1)
    column = tl.arange(0, V_PADDED)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([V_PADDED], tl.float32)
    for start in range(first, last, ITEMS):
        item = start + tl.arange(0, ITEMS)
        slot = item.to(tl.int64) * HEADS + head
        own = tl.load(maxima + slot, mask=item < last, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(own, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(own - safe)
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(
            weight * tl.load(sums + slot, mask=item < last, other=0.0), 0
        )
        values = tl.load(
            partial + slot[:, None] * V_DIM + column[None, :],
            mask=(item < last)[:, None] & (column < V_DIM)[None, :],
            other=0.0,
        )
        acc = acc * decay + tl.sum(values * weight[:, None], 0)
        top = new_top
    result = acc / tl.where(total == 0, 1.0, total)
    at = out + (request * HEADS + head) * V_DIM + column
    tl.store(at, result.to(out.dtype.element_ty), mask=column < V_DIM)


class PartialStates:
    """partial: float32 [items, heads, v_head_dim], not divided by the sum; maxima of the logits in
    units of log 2, and sums: float32 [items, heads]."""

    def __init__(self, items: int, heads: int, v_head_dim: int, device: torch.device) -> None:
        self.partial = torch.empty((items, heads, v_head_dim), dtype=torch.float32, device=device)
        self.maxima = torch.empty((items, heads), dtype=torch.float32, device=device)
        self.sums = torch.empty_like(self.maxima)

    def merge(self, schedule: Schedule, out: torch.Tensor) -> None:
        """out: contiguous [B, heads, v_head_dim]; zeros for a request without items."""
        batch, heads, v_head_dim = out.shape
        _merge[(batch, heads)](
            *(out, self.partial, self.maxima, self.sums, schedule.item_start),
            HEADS=heads,
            V_DIM=v_head_dim,
            V_PADDED=triton.next_power_of_2(v_head_dim),
            ITEMS=ITEMS_AT_ONCE,
        )
