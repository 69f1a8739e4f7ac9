"""Torch operators in place of Triton kernels that SGLang's layers call on a CPU too."""

from collections.abc import Callable
from typing import Any

import torch

_MASK = 0xFFFFFFFF


def softcap_logits(
    original: Callable[..., Any],
    full_logits: torch.Tensor,
    final_logit_softcapping: float | None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """cap * tanh(logits / cap), or the logits where there is no cap; in `output`, float32, or
    in place."""
    target = full_logits if output is None else output
    values = full_logits.float()
    if final_logit_softcapping is not None:
        values = torch.tanh(values / final_logit_softcapping) * final_logit_softcapping
    return target.copy_(values)


def gate_sigmoid_mul(
    original: Callable[..., Any],
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    *,
    do_add: bool,
) -> None:
    """output (+)= sigmoid(hidden_states . gate_weight) * shared_output, rows of [tokens, hidden].

    The product is summed in float64: a token's gate does not depend on its batch.
    """
    gate = torch.sigmoid(hidden_states.double() @ gate_weight.double()).float()[:, None]
    product = gate * shared_output.float()
    output.copy_(output.float() + product if do_add else product)


def murmur_hash32(
    original: Callable[..., Any],
    seed: torch.Tensor,
    positions: torch.Tensor,
    col_indices: torch.Tensor,
) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bits, seed 0) of 16 bytes: a row's 64-bit seed and 32-bit position and a
    column's 32-bit index. seed, positions [n], col_indices [m] -> uint32 [n, m]."""
    numbers = seed.view(torch.int64)
    words = (numbers & _MASK, (numbers >> 32) & _MASK, positions.long() & _MASK)
    state = torch.zeros_like(numbers)
    for word in words:
        state = _murmur_mix(state, word)
    state = _murmur_mix(state[:, None], col_indices.long()[None] & _MASK) ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & _MASK
    return (state ^ (state >> 16)).to(torch.uint32)


def _murmur_mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    # Of a product that wraps the lower 32 bits are right.
    word = _rotated((word * 0xCC9E2D51) & _MASK, 15)
    mixed = _rotated(state ^ ((word * 0x1B873593) & _MASK), 13)
    return (mixed * 5 + 0xE6546B64) & _MASK


def _rotated(number: torch.Tensor, bits: int) -> torch.Tensor:
    return ((number << bits) | (number >> (32 - bits))) & _MASK
