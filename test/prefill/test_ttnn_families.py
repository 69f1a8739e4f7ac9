"""Which models of each family the Tenstorrent runtime takes."""

import math
from typing import Any

import pytest
from transformers import AutoConfig

from sglang_hma.config import WeightFormats
from sglang_hma.prefill.ttnn.config_fields import check_fields
from sglang_hma.prefill.ttnn.errors import UnsupportedModel
from sglang_hma.prefill.ttnn.pieces import source_shapes
from sglang_hma.prefill.ttnn.shape import ModelShape

from .models import LONGROPE, random_model


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        ("mistral", {"sliding_window": 511}, "sliding_window is 511, less than .* of 512"),
        ("mistral", {"sliding_window": 511, "context_len": 511}, None),
        ("mistral", {"sliding_window": 512}, None),
        ("phi3", {"sliding_window": 256}, "sliding_window is 256, less than .* of 512"),
        ("llama", {"sliding_window": 256}, None),
        ("qwen2.5", {"sliding_window": 256}, None),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
        ("phi3, longrope", {"context_len": 257}, "rope_type is longrope and .* 257: .* = 256"),
        ("phi3, longrope", {"context_len": None}, "rope_type is longrope and .* 512: .* = 256"),
        ("phi3, longrope", {}, None),
        ("phi3, longrope", {"rope_parameters": {"short_mscale": 1.1}}, "the rope has short_mscale"),
        ("llama", {"num_experts": 32}, "has num_experts = 32"),
        ("qwen3_moe", {"num_experts": 48}, "num_experts is 48"),
        ("qwen3_moe", {"num_experts_per_tok": 33}, "num_experts_per_tok 33"),
        ("qwen3_moe", {"moe_intermediate_size": 80}, "moe_intermediate_size is 80"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "has shared_expert_intermediate"),
        ("qwen3_moe", {"moe_intermediate_size": 96, "intermediate_size": 96}, None),
    ],
)
def test_fields_of_families(kind: str, change: dict[str, Any], word: str | None) -> None:
    config = random_model(kind).config
    for name, value in change.items():
        setattr(config, name, LONGROPE | value if name == "rope_parameters" else value)
    if word is None:
        check_fields(config)
        ModelShape.of(config).split(2)
        return
    with pytest.raises(UnsupportedModel, match=word):
        check_fields(config)
        ModelShape.of(config).split(2)


# What the published config.json says beside transformers' defaults, and millions of parameters.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"num_hidden_layers": 48, "head_dim": 128, "max_position_embeddings": 40960}
        | {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True},
        30_532,
    ),
    "phi-4": (
        "phi3",
        {"hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40}
        | {"num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352}
        | {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384}
        | {"architectures": ["Phi3ForCausalLM"], "sliding_window": None},
        14_660,
    ),
    "Mistral-7B-v0.3": (
        "mistral",
        {"vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None}
        | {"architectures": ["MistralForCausalLM"], "rope_theta": 1e6},
        7_248,
    ),
    "Qwen2.5-7B": (
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
        | {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
        | {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 131072},
        7_616,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_taken(name: str) -> None:
    """With all of their parameters; packed, a byte and a sixteenth each, but for the embedding."""
    model_type, fields, millions = PUBLISHED[name]
    config = AutoConfig.for_model(model_type, **fields)
    check_fields(config)
    shape = ModelShape.of(config)
    parameters = sum(math.prod(size) for size in source_shapes(shape).values())
    assert round(parameters / 10**6) == millions
    packed = shape.weight_bytes(WeightFormats()) - shape.vocab * shape.hidden * (2 - 17 / 16)
    assert abs(packed / (parameters * 17 / 16) - 1) < 0.01
    halves = 2 * shape.split(2).weight_bytes(WeightFormats()) - shape.weight_bytes(WeightFormats())
    assert halves < 0.2 * packed
