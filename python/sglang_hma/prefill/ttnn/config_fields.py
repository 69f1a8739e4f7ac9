"""Fields of a model's config: each is known, or the model is refused by that field's name.

A field that the runtime does not know may change the arithmetic, and its answers would be wrong
without a word. So nothing is let through because nobody has heard of it.
"""

from collections.abc import Mapping
from typing import Any

from sglang_hma.prefill.ttnn.errors import UnsupportedModel

# What shape.py and rotary_embedding (model.py) make of a config, and what is looked at here.
HANDLED = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "attention_bias", "mlp_bias", "bias", "tie_word_embeddings"),
    *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    *("hidden_act", "layer_types", "use_sliding_window", "partial_rotary_factor", "v_head_dim"),
    *("sliding_window", "context_len"),
}

# Of training, of tokenizers, of files, of other code; what use_sliding_window or layer_types switch
# off; and what SGLang notes in a config.
HARMLESS = {
    *("attention_dropout", "initializer_range", "use_cache", "pretraining_tp", "dtype"),
    *("torch_dtype", "transformers_version", "transformers.js_config", "auto_map"),
    *("id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward"),
    *("output_attentions", "output_hidden_states", "return_dict", "task_specific_params"),
    *("max_window_layers", "quantization_config", "encoder_only", "language_only"),
    *("language_model_only", "swa_head_dim", "swa_v_head_dim"),
}

# Of single architectures: what experts.py makes of them, and what only training knows.
OWN = {
    "Qwen3MoeForCausalLM": {
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
        *("output_router_logits", "router_aux_loss_coef"),
    },
    "Phi3ForCausalLM": {"original_max_position_embeddings", "resid_pdrop", "embd_pdrop"},
}
# Those whose sliding_window holds without another field that switches it on.
WINDOWED = ("MistralForCausalLM", "Phi3ForCausalLM")

ROPE_TYPES = {"default", "linear", "llama3", "yarn", "longrope"}


def check_fields(config: Any) -> None:
    """config: transformers', as a checkpoint and the command line make it. In a running server
    SGLang has written more into it. Raises UnsupportedModel, in one line."""
    given = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    architecture = (given.get("architectures") or [""])[0]
    own = OWN.get(architecture, set())
    for name, value in given.items():
        known = name in HANDLED | HARMLESS | own or name.startswith(("_", "unsloth"))
        if not (known or name.endswith("_token_id") or _is_neutral(value)):
            raise UnsupportedModel(
                f"the config has {name} = {_shown(value)}, which the runtime does not know: it may "
                "change the arithmetic"
            )
    if given.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act is {given['hidden_act']}, the runtime has silu")
    if given.get("use_sliding_window"):
        raise UnsupportedModel("use_sliding_window is set: layers would need windows")
    context = given.get("context_len") or given.get("max_position_embeddings") or 0
    window = given.get("sliding_window")
    if architecture in WINDOWED and window is not None and window < context:
        raise UnsupportedModel(
            f"sliding_window is {window}, less than the served context of {context}, and windows "
            f"are not computed (--context-length {window} here and for decode needs none)"
        )
    dims = {given.get(name) for name in ("head_dim", "v_head_dim")} - {None}
    if len(dims) > 1:
        raise UnsupportedModel("head_dim and v_head_dim differ: the runtime has one size of head")
    other = set(given.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise UnsupportedModel(f"layer_types has {sorted(other)[0]}, the runtime full_attention")
    _check_rope(given, context)


def _check_rope(given: Mapping[str, Any], context: int) -> None:
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(
            f"rope_type is {_shown(kind)}: the runtime has {', '.join(sorted(ROPE_TYPES))}"
        )
    if kind == "longrope":
        _check_longrope(given, rope, context)
    for factor in (given.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if factor not in (None, 1):
            raise UnsupportedModel(f"partial_rotary_factor is {factor}: whole heads are rotated")


def _check_longrope(given: Mapping[str, Any], rope: Mapping[str, Any], context: int) -> None:
    """transformers takes the factors for long texts for all positions as soon as one is beyond the
    original context. Pages that were written before have the others."""
    for name in ("short_mscale", "long_mscale"):
        if rope.get(name) is not None:
            raise UnsupportedModel(f"the rope has {name}, which transformers has not")
    places = (rope, given)
    name = "original_max_position_embeddings"
    original = next((place[name] for place in places if place.get(name)), 0)
    if context > original:
        raise UnsupportedModel(
            f"rope_type is longrope and the served context {context}: pages are only right up to "
            f"{name} = {original} (--context-length {original} here and for decode)"
        )


def _is_neutral(value: Any) -> bool:
    """Not set, or a factor of one."""
    if value is None or value is False or value in ("", [], {}, ()):
        return True
    return isinstance(value, (int, float)) and value is not True and value == 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
