"""A model's linear weights, and what they become in a prefill card's BFP8.

The vendor's host packer takes W.T, so 16 neighbouring output features share an exponent.
Embeddings, norms, biases and routers of experts stay as they are.
"""

import copy
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from torch.nn import Embedding, Module, ModuleList, Parameter

from hma_kernels import bfp8_round
from sglang_hma.config import WeightGroup

_EXPERT_WEIGHTS = ("w13_weight", "w2_weight")
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def refuse_quantized(model: Module) -> None:
    """Raise RuntimeError if the weights of a linear layer or of experts are already in another
    format."""
    for module in model.modules():
        linear = isinstance(module, LinearBase) and not has_plain_weight(module)
        experts = holds_experts(module) and not all(
            getattr(module, name).dtype in _PLAIN for name in _EXPERT_WEIGHTS
        )
        if linear or experts:
            method = type(getattr(module, "quant_method", module)).__name__
            raise RuntimeError(
                f"the checkpoint is quantized ({method}): serve it with --hma-weight-format native"
            )


def has_plain_weight(module: LinearBase) -> bool:
    return isinstance(module.quant_method, UnquantizedLinearMethod)


def linear_weights(model: Module) -> list[tuple[Module, str]]:
    """(module, parameter name) of each plain linear weight, the LM head and experts included;
    routers too, which `routers` finds."""
    found: list[tuple[Module, str]] = []
    for module in model.modules():
        if isinstance(module, LinearBase):
            if has_plain_weight(module):
                found.append((module, "weight"))
        elif isinstance(module, ParallelLMHead):
            found.append((module, "weight"))
        elif holds_experts(module):
            found += [(module, name) for name in _EXPERT_WEIGHTS]
    lm_head = getattr(model, "lm_head", None)
    if lm_head is not None and all(lm_head is not module for module, _ in found):
        found.append((lm_head, "weight"))
    return found


def holds_experts(module: Module) -> bool:
    return all(isinstance(getattr(module, n, None), Parameter) for n in _EXPERT_WEIGHTS)


def refuse_unknown_experts(model: Module) -> None:
    """Raise RuntimeError for experts whose weights `linear_weights` does not find, or that the
    model reads from a copy."""
    for path, module in model.named_modules():
        stacked = any(weight.dim() == 3 for weight in module.parameters(recurse=False))
        listed = isinstance(getattr(module, "experts", None), ModuleList)
        if listed or (stacked and not holds_experts(module)):
            raise RuntimeError(
                f"{type(module).__name__} at {path} keeps experts' weights in a form that is not "
                "rounded here: serve it with --hma-weight-format experts=native"
            )


def routers(model: Module) -> set[Module]:
    """What chooses a token's experts and weighs them, and all modules in it: a card keeps them in
    BF16. Of SGLang's models and of those of transformers."""
    found: set[Module] = set()
    for block in model.modules():
        children = dict(block.named_children())
        sparse = "experts" in children or any(
            weight.dim() == 3 for weight in block.parameters(recurse=False)
        )
        for name in ("router", "shared_expert_gate", *(("gate",) if sparse else ())):
            if name in children:
                found.update(children[name].modules())
    return found


def group_of(path: str) -> WeightGroup:
    """Of a linear layer below the head, by its path in the model."""
    parts = path.split(".")
    if "experts" in parts:
        return "experts"
    in_attention = any("attn" in part or "attention" in part for part in parts)
    return "attention" if in_attention else "mlp"


def weight_groups(model: Module) -> dict[Module, WeightGroup]:
    """Of every module: "head" for the LM head, the others by their path. What all tokens pass
    beside the experts they choose (shared experts) is "mlp"."""
    groups: dict[Module, WeightGroup] = {}
    for path, module in model.named_modules():
        groups[module] = "experts" if holds_experts(module) else group_of(path)
        if isinstance(module, ParallelLMHead):
            groups[module] = "head"
    lm_head = getattr(model, "lm_head", None)
    if lm_head is not None:
        groups[lm_head] = "head"
    return groups


def untie_lm_head(model: Module) -> None:
    """Give a tied LM head its own parameter, so that the embedding stays unrounded.

    Raises RuntimeError if the model has no head that can be told from its embeddings.
    """
    embeddings = [
        module
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding | Embedding)
        and not isinstance(module, ParallelLMHead)
    ]
    lm_head = getattr(model, "lm_head", None)
    if lm_head is None:
        if any(isinstance(module, ParallelLMHead) for module in model.modules()):
            return
        if not isinstance(getattr(model, "logits_processor", None), Module) or len(embeddings) != 1:
            raise RuntimeError(
                f"{type(model).__name__} has no LM head that can be rounded apart from its "
                "embeddings: serve it with --hma-weight-format head=native"
            )
        lm_head = embeddings[0]
    tied = [module for module in embeddings if module.weight is lm_head.weight]
    if tied:
        model.lm_head = _with_own_weight(lm_head)
        _score_with_lm_head(model, tied)


def _with_own_weight(embedding: Any) -> Any:
    own = copy.copy(embedding)
    own._parameters = dict(embedding._parameters)
    own.weight = Parameter(embedding.weight.data, requires_grad=False)
    return own


def _score_with_lm_head(model: Module, embeddings: list[Module]) -> None:
    """Some models hand SGLang's logits processor their embedding, whether they have an lm_head
    or not: it is given `lm_head` in its place."""
    processor = getattr(model, "logits_processor", None)
    if not isinstance(processor, Module):
        return

    def head(value: Any) -> Any:
        return model.lm_head if any(value is one for one in embeddings) else value

    def swap(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(head, args)), {name: head(value) for name, value in kwargs.items()}

    processor.register_forward_pre_hook(swap, with_kwargs=True)


def round_weight(weight: torch.Tensor) -> torch.Tensor:
    """[..., out, in] through the host packer as [..., in, out]; same shape and dtype."""
    transposed = weight.transpose(-1, -2)
    pad = -transposed.shape[-1] % 16
    padded = torch.nn.functional.pad(transposed, (0, pad)) if pad else transposed
    rounded = bfp8_round(padded.contiguous(), rounding="host")
    return rounded[..., : transposed.shape[-1]].transpose(-1, -2).contiguous()
