"""The softmax that is built up tile by tile, and queries as the tensor cores take them."""

from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


def mma_type(device: torch.device) -> Any:
    """What products take. The interpreter's does not know bfloat16."""
    return tl.bfloat16 if device.type == "cuda" else tl.float32


@triton.jit
def split_query(given, MMA: tl.constexpr):
    """A query as two summands that bfloat16 holds: float16 has 11 significant bits, bfloat16 8."""
    wide = given.to(tl.float32)
    high = wide.to(tl.bfloat16).to(tl.float32)
    return high.to(MMA), (wide - high).to(MMA)


@triton.jit
def empty_state(ROWS: tl.constexpr, V_PADDED: tl.constexpr):
    """Maximum, sum and output of queries that have seen no key."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    return top, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, V_PADDED], tl.float32)


@triton.jit
def attend(
    state_max,
    state_sum,
    state_out,
    q,
    q_low,
    k,
    v,
    visible,
    scale,
    logit_cap,
    SPLIT_Q: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """One tile of keys [N] added to the softmax state of queries [M]; logits count in log2.

    visible: bool [1, N] or [M, N]. K rows that nobody sees must be finite, V rows zero or finite.
    """
    logits = tl.dot(q, tl.trans(k))
    if SPLIT_Q:
        logits += tl.dot(q_low, tl.trans(k))
    logits *= scale
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        logits = logit_cap * (1 - 2 / (tl.exp2(logits * (2 * LOG2E / logit_cap)) + 1))
    logits = tl.where(visible, logits * LOG2E, float("-inf"))
    new_max = tl.maximum(state_max, tl.max(logits, 1))
    # A tile may show nothing: -inf - -inf must not become NaN.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits - safe_max[:, None])
    decay = tl.exp2(state_max - safe_max)
    state_sum = state_sum * decay + tl.sum(weights, 1)
    state_out = state_out * decay[:, None] + tl.dot(weights.to(v.dtype), v)
    return new_max, state_sum, state_out
