"""Partial softmax states of a batch's work items, and their exact merge per request."""

import torch
import triton
import triton.language as tl

from hma_kernels.triton.schedule import Schedule
from hma_kernels.triton.softmax import with_sink

ITEMS_PER_STEP = 16


@triton.jit
def _merge(
    out,
    partial_out,
    partial_max,
    partial_sum,
    item_indptr,
    sinks,
    HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    ITEMS_PER_STEP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One program a request and query head; items are merged in a fixed order."""
    request, head = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(item_indptr + request), tl.load(item_indptr + request + 1)
    column = tl.arange(0, V_PADDED)
    state_max = tl.full([], float("-inf"), tl.float32)
    state_sum = tl.zeros([], tl.float32)
    state_out = tl.zeros([V_PADDED], tl.float32)
    for start in range(first, last, ITEMS_PER_STEP):
        item = start + tl.arange(0, ITEMS_PER_STEP)
        slot = item.to(tl.int64) * HEADS + head
        maxima = tl.load(partial_max + slot, mask=item < last, other=float("-inf"))
        new_max = tl.maximum(state_max, tl.max(maxima, 0))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(maxima - safe_max)
        decay = tl.exp2(state_max - safe_max)
        sums = tl.load(partial_sum + slot, mask=item < last, other=0.0)
        state_sum = state_sum * decay + tl.sum(weight * sums, 0)
        values = tl.load(
            partial_out + slot[:, None] * V_DIM + column[None, :],
            mask=(item < last)[:, None] & (column < V_DIM)[None, :],
            other=0.0,
        )
        state_out = state_out * decay + tl.sum(values * weight[:, None], 0)
        state_max = new_max
    if SINKS:
        state_sum = with_sink(state_max, state_sum, tl.load(sinks + head))
    result = state_out / tl.where(state_sum == 0, 1.0, state_sum)
    tl.store(
        out + (request * HEADS + head) * V_DIM + column,
        result.to(out.dtype.element_ty),
        mask=column < V_DIM,
    )


class PartialStates:
    """One softmax state (triton/softmax.py) per work item and query head.

    out: float32 [items, heads, v_head_dim]. max, sum: float32 [items, heads].
    """

    def __init__(self, items: int, heads: int, v_head_dim: int, device: torch.device) -> None:
        self.out = torch.empty((items, heads, v_head_dim), dtype=torch.float32, device=device)
        self.max = torch.empty((items, heads), dtype=torch.float32, device=device)
        self.sum = torch.empty_like(self.max)

    def merge(
        self, schedule: Schedule, out: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> None:
        """out: contiguous [B, heads, v_head_dim]; zeros for a request without items."""
        batch_size, heads, v_head_dim = out.shape
        _merge[(batch_size, heads)](
            *(out, self.out, self.max, self.sum, schedule.item_indptr, sinks),
            HEADS=heads,
            V_DIM=v_head_dim,
            V_PADDED=triton.next_power_of_2(v_head_dim),
            ITEMS_PER_STEP=ITEMS_PER_STEP,
            SINKS=sinks is not None,
        )
