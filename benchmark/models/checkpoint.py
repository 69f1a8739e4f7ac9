"""A tiny random checkpoint of a family, with weights that leave no parameter without effect."""

import json
from pathlib import Path
from typing import Any

import torch

from benchmark.models.families import Family
from sglang_hma.demo.random_model import WEIGHT_GAIN

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def make_checkpoint(family: Family, folder: Path, seed: int) -> Any:
    """Writes it in BF16; returns the transformers model in float64, with the same values."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = family.config()
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER).eval()
        _spread(model)
        for name in family.zero:
            model.get_parameter(name).data.zero_()
        if family.embedding != 1:
            model.get_input_embeddings().weight.data *= family.embedding
    model.bfloat16().save_pretrained(folder)
    changes = dict(family.written)
    if family.architecture is not None:
        changes["architectures"] = [family.architecture]
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **EAGER).eval()


@torch.no_grad()
def _spread(model: Any) -> None:
    """Norms away from what they begin as, biases away from 0, matrices from unit variance to
    WEIGHT_GAIN**2."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" not in name and "ln" not in name:
            parameter.normal_(0, 0.2)
        elif parameter.dim() == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        else:
            parameter.normal_(0, WEIGHT_GAIN / parameter.shape[-1] ** 0.5)
