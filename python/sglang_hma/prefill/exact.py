"""Linear layers whose result does not depend on the batch, for --dtype float32 on a CPU.

A GEMM's rounding depends on its row count, and a last-bit difference in K can flip a BFP8
rounding. Sums in float64, rounded once, leave no such difference: a token does not depend on what
else is in its batch.
"""

from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from typing_extensions import override


class Float64LinearMethod(UnquantizedLinearMethod):
    """y = x W^T + b in float64, rounded once to x's dtype. W is stored as float64."""

    @override
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        wide_bias = None if bias is None else bias.double()
        return torch.nn.functional.linear(x.double(), layer.weight, wide_bias).to(x.dtype)
