"""The reference prefill runtime: SGLang's own model with a prefill card's weights.

Linear weights pass through BFP8 as the vendor's host packer writes them: packed
as W.T, so 16 neighbouring output features share an exponent. Embeddings, norms
and biases stay as they are. Decode uses the checkpoint's weights; a server that
does both holds both sets and points the parameters at the one a forward needs.

Under --dtype float32 on CPU, linear layers accumulate in float64 and round once.
A GEMM's rounding depends on its row count, and a last-bit difference in K can
flip a BFP8 rounding; with this, a token does not depend on its batch.
"""

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from torch.nn import Module, Parameter

from hma_kernels import bfp8_round
from sglang_hma.config import HmaConfig, WeightGroup

logger = logging.getLogger(__name__)

_EXPERT_WEIGHTS = ("w13_weight", "w2_weight")


@dataclass
class PhaseWeights:
    """Parameters whose data differ between prefill and decode."""

    sets: list[tuple[Parameter, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    in_prefill: bool = False

    def add(self, parameter: Parameter, *, prefill: torch.Tensor, decode: torch.Tensor) -> None:
        self.sets.append((parameter, prefill, decode))

    def enter(self, *, prefill: bool) -> None:
        if self.in_prefill == prefill:
            return
        for parameter, for_prefill, for_decode in self.sets:
            parameter.data = for_prefill if prefill else for_decode
        self.in_prefill = prefill


_phase_weights = PhaseWeights()


def enter_phase(*, prefill: bool) -> None:
    """Make the parameters hold the weights of the coming forward."""
    _phase_weights.enter(prefill=prefill)


def prepare_model(model: Module) -> None:
    """Apply the weight formats of this server's role to a freshly loaded model."""
    config = HmaConfig.require()
    exact = config.packs_kv and config.device == "cpu"
    if config.rounds_prefill_weights:
        refuse_quantized(model)
        untie_lm_head(model)
    elif not exact:
        return
    rounded = 0
    groups = weight_groups(model)
    for module, name in linear_weights(model):
        parameter = getattr(module, name)
        wide = exact and parameter.dtype == torch.float32 and isinstance(module, LinearBase)
        if config.rounds_prefill_weights and config.weight_formats.packs(groups[module]):
            rounded += 1
            for_prefill = round_weight(parameter.data)
            if config.role == "null":
                decode = parameter.data.double() if wide else parameter.data
                prefill = for_prefill.double() if wide else for_prefill
                _phase_weights.add(parameter, prefill=prefill, decode=decode)
                parameter.data = decode
            else:
                parameter.data = for_prefill
        if wide:
            parameter.data = parameter.data.double()
            module.quant_method = Float64LinearMethod()
    logger.info("Linear weights rounded to BFP8 for prefill: %d", rounded)


def refuse_quantized(model: Module) -> None:
    """Raise RuntimeError if a linear layer's weights are already in another format."""
    for module in model.modules():
        if isinstance(module, LinearBase) and not has_plain_weight(module):
            raise RuntimeError(
                f"the checkpoint is quantized ({type(module.quant_method).__name__}): "
                "serve it with --hma-weight-format native"
            )


def has_plain_weight(module: LinearBase) -> bool:
    return isinstance(module.quant_method, UnquantizedLinearMethod)


def linear_weights(model: Module) -> list[tuple[Module, str]]:
    """(module, parameter name) of each plain linear weight, the LM head and experts included."""
    found: list[tuple[Module, str]] = []
    for module in model.modules():
        if isinstance(module, LinearBase):
            if has_plain_weight(module):
                found.append((module, "weight"))
        elif isinstance(module, ParallelLMHead):
            found.append((module, "weight"))
        elif all(isinstance(getattr(module, n, None), Parameter) for n in _EXPERT_WEIGHTS):
            found += [(module, name) for name in _EXPERT_WEIGHTS]
    lm_head = getattr(model, "lm_head", None)
    if lm_head is not None and all(lm_head is not module for module, _ in found):
        found.append((lm_head, "weight"))
    return found


def weight_groups(model: Module) -> dict[Module, WeightGroup]:
    """Of every module: "head" for the LM head, "attention" by its name, "mlp" for the others."""
    groups: dict[Module, WeightGroup] = {}
    for path, module in model.named_modules():
        in_attention = any("attn" in part or "attention" in part for part in path.split("."))
        groups[module] = "attention" if in_attention else "mlp"
        if isinstance(module, ParallelLMHead):
            groups[module] = "head"
    lm_head = getattr(model, "lm_head", None)
    if lm_head is not None:
        groups[lm_head] = "head"
    return groups


def untie_lm_head(model: Module) -> None:
    """Give a tied LM head its own parameter, so that the embedding stays unrounded."""
    lm_head = getattr(model, "lm_head", None)
    if not isinstance(lm_head, VocabParallelEmbedding):
        return
    shared = [
        module
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding)
        and not isinstance(module, ParallelLMHead)
        and module.weight is lm_head.weight
    ]
    if not shared:
        return
    own = copy.copy(lm_head)
    own._parameters = dict(lm_head._parameters)
    own.weight = Parameter(lm_head.weight.data, requires_grad=False)
    model.lm_head = own


def round_weight(weight: torch.Tensor) -> torch.Tensor:
    """[..., out, in] through the host packer as [..., in, out]; same shape and dtype."""
    transposed = weight.transpose(-1, -2)
    pad = -transposed.shape[-1] % 16
    padded = torch.nn.functional.pad(transposed, (0, pad)) if pad else transposed
    rounded = bfp8_round(padded.contiguous(), rounding="host")
    return rounded[..., : transposed.shape[-1]].transpose(-1, -2).contiguous()


class Float64LinearMethod(UnquantizedLinearMethod):
    """y = x W^T + b in float64, rounded once to x's dtype. W is stored as float64."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        wide_bias = None if bias is None else bias.double()
        return torch.nn.functional.linear(x.double(), layer.weight, wide_bias).to(x.dtype)
