"""Outlier channels in K that leave the function as it is: stress for a format's groups.

A few channels of each KV head become `factor` times larger in K and smaller in Q. RoPE turns a
channel and the one half a head further together, so both get the same factor.
"""

from typing import Any

import torch

CHANNELS = 2  # of a head, and their partners


def add_outliers(model: Any, factor: float) -> None:
    """In place, on every attention layer; Llama's and Qwen's projections, or Qwen3's norms."""
    config = model.config
    for layer, block in enumerate(model.model.layers):
        attention = block.self_attn
        dim = attention.head_dim
        scale = torch.ones(dim)
        first = [(7 * layer + 5 * i) % (dim // 2) for i in range(CHANNELS)]
        scale[[*first, *(channel + dim // 2 for channel in first)]] = factor
        if hasattr(attention, "k_norm"):
            _scale(attention.k_norm, scale)
            _scale(attention.q_norm, 1 / scale)
        else:
            _scale(attention.k_proj, scale.repeat(config.num_key_value_heads))
            _scale(attention.q_proj, (1 / scale).repeat(config.num_attention_heads))


@torch.no_grad()
def _scale(module: Any, rows: torch.Tensor) -> None:
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            factor = rows.view(-1, *[1] * (tensor.dim() - 1))
            tensor.copy_((tensor.to(torch.float32) * factor).to(tensor.dtype))
