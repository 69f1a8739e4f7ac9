"""Precision policies: in which format each part of prefill and decode is kept.

Only weights of linear layers and the KV cache of the prompt differ. Activations, norms, embeddings
and the KV cache of generated tokens are the model's dtype (BF16) under every policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch

from hma_kernels.layout import GROUP
from sglang_hma.config import WeightGroup

# [tokens, heads, dim] -> the values that a kernel reads back, float32.
Rounding = Callable[[torch.Tensor], torch.Tensor]
E4M3_MAX = 448.0


def fp8_per_tensor(x: torch.Tensor) -> torch.Tensor:
    """FP8 e4m3 with one scale, that of the largest value, for all of x."""
    return _fp8(x, x.abs().amax())


def fp8_per_token(x: torch.Tensor) -> torch.Tensor:
    """FP8 e4m3 with a scale a token and head."""
    return _fp8(x, x.abs().amax(-1, keepdim=True))


def _fp8(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scale = (largest / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale


def integer(bits: int) -> Rounding:
    """Symmetric integers with a scale a token and head."""
    top = 2 ** (bits - 1) - 1

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax(-1, keepdim=True) / top).clamp_min(torch.finfo(torch.float32).tiny)
        return (x / scale).round().clamp(-top, top) * scale

    return rounded


def bfp4(x: torch.Tensor) -> torch.Tensor:
    """16 neighbouring values with one exponent and 3 bits of magnitude each: BFP8's layout with
    4 bits less."""
    groups = x.unflatten(-1, (-1, GROUP))
    _, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))
    step = torch.exp2((exponent - 3).to(x.dtype))  # the largest is in [4, 8) steps
    return ((groups / step).round().clamp(-7, 7) * step).flatten(-2)


@dataclass(frozen=True)
class Policy:
    """`prefill_packed`, `decode_packed`: the groups of linear weights that go through BFP8 there.
    `kv`: the prompt's K and V as "bf16", as "bfp8" (the product's pages) or through a rounding;
    "float32" is everything in float32, by transformers alone. `noise`: relative, on the prompt's K
    and V before they are rounded, as another order of summation leaves. `own_reply`: decode has
    said the middle third of the prompt, a turn before, and keeps its own K and V of it."""

    name: str
    prefill_packed: tuple[str, ...] = ()
    decode_packed: tuple[str, ...] = ()
    kv: Rounding | str = "bf16"
    dtype: torch.dtype = torch.bfloat16
    noise: float = 0.0
    own_reply: bool = False


ALL = get_args(WeightGroup)
BF16 = Policy("BF16")
FLOAT32 = Policy("float32", kv="float32", dtype=torch.float32)
OURS = Policy("ours", ALL, kv="bfp8")
OURS_FLOAT32 = Policy("ours, float32", ALL, kv="bfp8", dtype=torch.float32)  # as tests serve it
OWN_REPLY = Policy("ours, decode's own reply kept", ALL, kv="bfp8", own_reply=True)
KV_ONLY = Policy("KV BFP8 only", kv="bfp8")
FP8_PER_TENSOR = Policy("KV FP8 e4m3, a scale a tensor", kv=fp8_per_tensor)
FP8_PER_TOKEN = Policy("KV FP8 e4m3, a scale a token", kv=fp8_per_token)
INT8 = Policy("KV INT8, a scale a token", kv=integer(8))
INT4 = Policy("KV INT4, a scale a token", kv=integer(4))
BFP4 = Policy("KV BFP4", kv=bfp4)
PARTS = (
    KV_ONLY,
    Policy("weights BFP8 only", ALL),
    # Of dense models, which have no experts.
    *(Policy(f"weights BFP8 of {group} only", (group,)) for group in ALL if group != "experts"),
)
PEERS = (
    Policy("weights BFP8 in decode too", ALL, ALL, kv="bfp8"),
    *(KV_ONLY, FP8_PER_TENSOR, FP8_PER_TOKEN, INT8, INT4, BFP4),
)
STRESSED = (KV_ONLY, FP8_PER_TENSOR, FP8_PER_TOKEN, INT8, BFP4)
