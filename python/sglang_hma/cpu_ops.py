"""Torch operators in place of Triton kernels that SGLang's layers call on a CPU too."""

from collections.abc import Callable
from typing import Any

import torch


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
