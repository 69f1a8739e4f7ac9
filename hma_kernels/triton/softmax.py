"""Softmax state of attention, updated one tile of keys at a time, and queries as the tensor cores
take them.

A state is a tuple: the maximum logit in units of log 2, the sum of weights relative to that
maximum, and the weighted sum of V, not yet divided by the sum of weights.
"""

from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


def mma_type(device: torch.device) -> Any:
    """The operand type of matrix products. Triton's interpreter has no bfloat16 products."""
    return tl.bfloat16 if device.type == "cuda" else tl.float32


@triton.jit
def split_query(given, MMA: tl.constexpr):
    """A query as the sum of two bfloat16 values: float16 has 11 significant bits, bfloat16 8."""
    wide = given.to(tl.float32)
    high = wide.to(tl.bfloat16).to(tl.float32)
    return high.to(MMA), (wide - high).to(MMA)


@triton.jit
def empty_state(ROWS: tl.constexpr, V_PADDED: tl.constexpr):
    """The state of ROWS queries that have seen no key."""
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    return maximum, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, V_PADDED], tl.float32)


@triton.jit
def attend(
    state,
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
    """The state of queries [M] after one more tile of keys [N].

    visible: bool [1, N] or [M, N]. Rows of K and V that no query sees must be finite.
    """
    state_max, state_sum, state_out = state
    logits = tl.dot(q, tl.trans(k))
    if SPLIT_Q:
        logits += tl.dot(q_low, tl.trans(k))
    logits *= scale
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        logits = logit_cap * (1 - 2 / (tl.exp2(logits * (2 * LOG2E / logit_cap)) + 1))
    logits = tl.where(visible, logits * LOG2E, float("-inf"))
    new_max = tl.maximum(state_max, tl.max(logits, 1))
    # While a query has seen no key, its maximum is -inf; -inf - -inf must not become NaN.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits - safe_max[:, None])
    decay = tl.exp2(state_max - safe_max)
    state_sum = state_sum * decay + tl.sum(weights, 1)
    state_out = state_out * decay[:, None] + tl.dot(weights.to(v.dtype), v)
    return new_max, state_sum, state_out


@triton.jit
def with_sink(state_max, state_sum, sink):
    """The sum of weights with that of a sink, a logit that weighs no value: infinite for one far
    above all others."""
    safe_max = tl.where(state_max == float("-inf"), 0.0, state_max)
    return state_sum + tl.exp2(sink * LOG2E - safe_max)
