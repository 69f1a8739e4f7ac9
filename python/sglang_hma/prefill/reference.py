"""The reference prefill runtime: SGLang's own model with a prefill card's weights.

Decode uses the checkpoint's weights; so does a server of either role whose format is native.
"""

import logging

import torch
from torch.nn import Module

from sglang_hma.config import HmaConfig
from sglang_hma.prefill import phase
from sglang_hma.prefill.exact import can_be_wide, widen
from sglang_hma.prefill.weights import (
    linear_weights,
    refuse_quantized,
    refuse_unknown_experts,
    round_weight,
    routers,
    untie_lm_head,
    weight_groups,
)

logger = logging.getLogger(__name__)


def prepare_model(model: Module) -> None:
    """Apply the weight formats of this server's role to a freshly loaded model."""
    if phase.as_stored.get():
        return
    config = HmaConfig.require()
    exact = config.packs_kv and config.device == "cpu"
    if config.rounds_prefill_weights:
        refuse_quantized(model)
        if config.weight_formats.packs("experts"):
            refuse_unknown_experts(model)
        if config.weight_formats.packs("head"):
            untie_lm_head(model)
    elif not exact:
        return
    rounded = 0
    groups, kept = weight_groups(model), routers(model)
    for module, name in linear_weights(model):
        parameter = getattr(module, name)
        wide = exact and parameter.dtype == torch.float32 and can_be_wide(module)
        packed = config.weight_formats.packs(groups[module]) and module not in kept
        if config.rounds_prefill_weights and packed:
            rounded += 1
            for_prefill = round_weight(parameter.data)
            if config.role == "null":
                decode = parameter.data.double() if wide else parameter.data
                prefill = for_prefill.double() if wide else for_prefill
                phase.weights.add(parameter, prefill=prefill, decode=decode)
                parameter.data = decode
            else:
                parameter.data = for_prefill
        if wide:
            parameter.data = parameter.data.double()
            widen(module)
    logger.info("Linear weights rounded to BFP8 for prefill: %d", rounded)
