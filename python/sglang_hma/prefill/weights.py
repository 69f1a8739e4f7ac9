"""A model's linear weights, and what they become in a prefill card's BFP8.

The vendor's host packer takes W.T, so 16 neighbouring output features share an exponent.
Embeddings, norms, biases and routers of experts stay as they are.
"""

import copy

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from torch.nn import Module, Parameter

from hma_kernels import bfp8_round
from sglang_hma.config import WeightGroup

_EXPERT_WEIGHTS = ("w13_weight", "w2_weight")


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


def routers(model: Module) -> set[Module]:
    """The layers that choose a token's experts: a card keeps them in BF16."""
    found = {getattr(m, "gate", None) for m in model.modules() if hasattr(m, "experts")}
    return {module for module in found if isinstance(module, LinearBase)}


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
