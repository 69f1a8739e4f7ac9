"""Random LoRA adapters of a model, as peft saves them."""

from pathlib import Path
from typing import Any

import torch

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(model: Path, folder: Path, seed: int, **fields: Any) -> Path:
    """`fields` are LoraConfig's. Its part of a layer's output is about half as large as the base
    weight's, times lora_alpha / r."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(**{"target_modules": list(ALL), **fields}))
    numbers = torch.Generator().manual_seed(seed)
    for name, factor in adapted.named_parameters():
        if "lora_" in name and factor.dim() == 2:  # A [r, in], B [out, r]
            gain = 0.5 if "lora_B" in name else 1.0
            drawn = torch.randn(factor.shape, generator=numbers)
            factor.data = drawn * gain / factor.shape[1] ** 0.5
    adapted.save_pretrained(str(folder))
    return folder
