"""The families: each MHA/GQA decoder that SGLang 0.5.23 registers and transformers can build.

A tiny model of each, with the fields away from their neutral values that a runtime could leave out
in silence: scales, soft caps, windows, partial rotary embeddings, shared experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, CONTEXT = 2, 128, 4, 2, 32, 256, 512, 2048
WINDOW = 48

SIZES: Mapping[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT_SIZES: Mapping[str, Any] = {
    "n_layer": LAYERS,
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_inner": INNER,
    "n_positions": CONTEXT,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MOE = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """`model_type` is transformers'; `architecture` SGLang's name, where it is another one."""

    name: str
    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # of SIZES
    base: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    architecture: str | None = None
    experts: int = 0
    zero: tuple[str, ...] = ()  # parameters
    # Fields of config.json that transformers would write in another way than they are published.
    written: Mapping[str, Any] = field(default_factory=dict)
    embedding: float = 1.0  # lets layers count where an embedding is scaled up and tied

    def config(self) -> Any:
        from transformers import AutoConfig

        sizes = {name: value for name, value in self.base.items() if name not in self.without}
        return AutoConfig.for_model(self.model_type, **(sizes | dict(self.fields)))


ALTERNATING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
WITHOUT_WINDOWS = {
    "sliding_window": None,
    "layer_types": ["full_attention"] * LAYERS,
    "sliding_window_pattern": None,
}
# As published: SGLang takes this base, whatever the config has.
EXAONE_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e6,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
}

FAMILIES = (
    Family("Llama", "llama", {"attention_bias": True}),
    Family("Llama, tied", "llama", {"tie_word_embeddings": True}),
    Family("Mistral", "mistral", {"sliding_window": None}),
    Family("Ministral 3", "ministral3"),
    Family("Qwen2", "qwen2", {"use_sliding_window": False}),
    Family("Qwen3", "qwen3"),
    Family("Gemma", "gemma", {"tie_word_embeddings": True}),
    Family(
        "Gemma 2",
        "gemma2",
        {
            **ALTERNATING,
            "tie_word_embeddings": True,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 20,
            "hidden_act": "gelu_pytorch_tanh",  # as published
        },
        embedding=0.5,
    ),
    Family("Gemma 3", "gemma3_text", {**ALTERNATING, "tie_word_embeddings": True}, embedding=0.5),
    # SGLang's has an MLP of four times the width, as the published ones.
    Family(
        "Phi",
        "phi",
        {"partial_rotary_factor": 0.5, "intermediate_size": 4 * HIDDEN},
        ("num_key_value_heads",),
    ),
    Family(
        "Phi, no bias at its head",
        "phi",
        {"partial_rotary_factor": 0.5, "intermediate_size": 4 * HIDDEN},
        ("num_key_value_heads",),
        zero=("lm_head.bias",),
    ),
    Family("Phi-3", "phi3"),
    Family("StableLM", "stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    Family("StarCoder2", "starcoder2", {"tie_word_embeddings": True, "sliding_window": None}),
    Family("Cohere (Command R)", "cohere", {"logit_scale": 0.5, "tie_word_embeddings": True}),
    Family(
        "Cohere 2 (Command R7B)",
        "cohere2",
        {**ALTERNATING, "logit_scale": 0.5, "tie_word_embeddings": True},
    ),
    Family(
        "Cohere 2, within its window",
        "cohere2",
        {**ALTERNATING, "sliding_window": CONTEXT, "logit_scale": 0.5, "tie_word_embeddings": True},
    ),
    Family(
        "Granite",
        "granite",
        {
            "attention_multiplier": 0.1,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    Family("OLMo", "olmo", {"clip_qkv": 4.0}, ("num_key_value_heads",)),
    Family("OLMo 2", "olmo2"),
    Family("GLM-4", "glm4", {"partial_rotary_factor": 0.5}),
    Family(
        "EXAONE 4",
        "exaone4",
        WITHOUT_WINDOWS | EXAONE_ROPE,
        written={"sliding_window_pattern": None},
    ),
    Family(
        "EXAONE 4, windows",
        "exaone4",
        ALTERNATING | EXAONE_ROPE,
        written={"sliding_window_pattern": "LG"},
    ),
    Family("Arcee", "arcee"),
    Family("Apertus", "apertus"),
    Family("ERNIE 4.5", "ernie4_5", architecture="Ernie4_5_ForCausalLM"),
    Family("HunYuan dense", "hunyuan_v1_dense", {"use_qk_norm": True}),
    Family("Persimmon", "persimmon", {"partial_rotary_factor": 0.5}, ("num_key_value_heads",)),
    Family(
        "OPT",
        "opt",
        {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN, "do_layer_norm_before": True},
        ("num_key_value_heads", "intermediate_size", "head_dim"),
    ),
    Family("GPT-2", "gpt2", base=GPT_SIZES),
    Family("GPT-J", "gptj", {"rotary_dim": 16}, base=GPT_SIZES, zero=("lm_head.bias",)),
    Family("GPT-BigCode", "gpt_bigcode", {"multi_query": True}, base=GPT_SIZES),
    Family(
        "Mixtral", "mixtral", {**LOCAL, "sliding_window": None}, experts=LOCAL["num_local_experts"]
    ),
    Family(
        "Qwen2-MoE",
        "qwen2_moe",
        {**MOE, "shared_expert_intermediate_size": 128, "norm_topk_prob": False},
        experts=8,
    ),
    Family("Qwen3-MoE", "qwen3_moe", {**MOE, "norm_topk_prob": True}, experts=8),
    Family(
        "OLMoE", "olmoe", {**MOE, "intermediate_size": 64, "num_key_value_heads": HEADS}, experts=8
    ),
    Family(
        "Phi-3.5-MoE",
        "phimoe",
        {**LOCAL, "sliding_window": None},
        architecture="PhiMoEForCausalLM",
        experts=8,
    ),
    Family("Granite MoE", "granitemoe", {**LOCAL, "attention_multiplier": 0.1}, experts=8),
    Family(
        "ERNIE 4.5 MoE",
        "ernie4_5_moe",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "use_bias": False,
        },
        experts=8,
    ),
    Family(
        "GLM-4 MoE",
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        experts=8,
    ),
    Family(
        "HunYuan MoE",
        "hunyuan_v1_moe",
        {
            "num_experts": 8,
            "moe_topk": [2, 2],
            "num_shared_expert": [1, 1],
            "moe_intermediate_size": [INNER, INNER],
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
        },
        experts=8,
    ),
    # SGLang gives its router the config's dtype, whatever --dtype says.
    Family(
        "gpt-oss",
        "gpt_oss",
        {**ALTERNATING, **LOCAL},
        experts=8,
        written={"dtype": "float32", "torch_dtype": "float32"},
    ),
    Family(
        "MiniMax-M2",
        "minimax_m2",
        {
            **LOCAL,
            "rotary_dim": 16,
            "scoring_func": "sigmoid",
            "use_qk_norm": True,
            "use_routing_bias": True,
            "num_mtp_modules": 0,
        },
        experts=8,
    ),
)
