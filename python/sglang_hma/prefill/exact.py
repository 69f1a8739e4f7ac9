"""Layers and experts whose result does not depend on the batch, for --dtype float32 on a CPU.

A GEMM's rounding depends on its row count, and a last-bit difference in K can flip a BFP8
rounding. Sums in float64, rounded once, leave no such difference: a token does not depend on what
else is in its batch.
"""

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import (
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)
from typing_extensions import override


def can_be_wide(module: Any) -> bool:
    """Whether `widen` knows how this layer computes."""
    return isinstance(module, LinearBase) or isinstance(
        getattr(module, "quant_method", None), UnquantizedFusedMoEMethod
    )


def widen(module: Any) -> None:
    """Let a layer whose weights are float64 by now compute in float64."""
    if isinstance(module, LinearBase):
        module.quant_method = Float64LinearMethod()
    elif not isinstance(module.quant_method, Float64ExpertsMethod):
        module.quant_method = Float64ExpertsMethod(module.quant_method)


class Float64LinearMethod(UnquantizedLinearMethod):
    """y = x W^T + b in float64, rounded once to x's dtype. W is stored as float64."""

    @override
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        wide_bias = None if bias is None else bias.double()
        return torch.nn.functional.linear(x.double(), layer.weight, wide_bias).to(x.dtype)


class Float64ExpertsMethod(UnquantizedFusedMoEMethod):
    """The experts' matrices in float64, each expert's answer rounded once to x's dtype: how many
    tokens share an expert changes none of them. Weights are stored as float64."""

    def __init__(self, of: UnquantizedFusedMoEMethod) -> None:
        """Goes on with what `of` was given for its layer."""
        self.__dict__.update(of.__dict__)

    @override
    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        x = dispatch_output.hidden_states
        out = super().forward_cpu(layer, dispatch_output._replace(hidden_states=x.double()))
        return out._replace(hidden_states=out.hidden_states.to(x.dtype))
