"""Fields of a model's config: each is known, or the model is refused by that field's name.

A field that the runtime does not know may change the arithmetic, and its answers would be wrong
without a word. So nothing is let through because nobody has heard of it.
"""

from collections.abc import Mapping
from typing import Any

from sglang_hma.prefill.ttnn.errors import UnsupportedModel

# What shape.py and rotary_embedding (model.py) make of a config.
HANDLED = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "attention_bias", "mlp_bias", "bias", "tie_word_embeddings"),
    *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    *("hidden_act", "layer_types", "use_sliding_window", "partial_rotary_factor", "v_head_dim"),
}

# Of training, of tokenizers, of files, of other code; what use_sliding_window or layer_types switch
# off; and what SGLang notes in a config.
HARMLESS = {
    *("attention_dropout", "initializer_range", "use_cache", "pretraining_tp", "dtype"),
    *("torch_dtype", "transformers_version"),
    *("id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward"),
    *(
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "auto_map",
        *("task_specific_params", "context_len", "encoder_only", "language_only"),
        *("language_model_only", "swa_head_dim", "swa_v_head_dim"),
    ),
    *("sliding_window", "max_window_layers", "quantization_config", "transformers.js_config"),
    *("task_specific_params", "context_len", "encoder_only", "language_only"),
    *("language_model_only", "swa_head_dim", "swa_v_head_dim"),
}

ROPE_TYPES = {"default", "linear", "llama3", "yarn"}


def check_fields(config: Any) -> None:
    """config: transformers', as a checkpoint and the command line make it. In a running server
    SGLang has written more into it. Raises UnsupportedModel, in one line."""
    given = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    for name, value in given.items():
        known = name in HANDLED or name in HARMLESS or name.startswith(("_", "unsloth"))
        if not (known or name.endswith("_token_id") or _is_neutral(value)):
            raise UnsupportedModel(
                f"the config has {name} = {_shown(value)}, which the runtime does not know: it may "
                "change the arithmetic"
            )
    if given.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act is {given['hidden_act']}, the runtime has silu")
    if given.get("use_sliding_window"):
        raise UnsupportedModel("use_sliding_window is set: layers would need windows")
    dims = {given.get(name) for name in ("head_dim", "v_head_dim")} - {None}
    if len(dims) > 1:
        raise UnsupportedModel("head_dim and v_head_dim differ: the runtime has one size of head")
    other = set(given.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise UnsupportedModel(f"layer_types has {sorted(other)[0]}, the runtime full_attention")
    _check_rope(given)


def _check_rope(given: Mapping[str, Any]) -> None:
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(
            f"rope_type is {_shown(kind)}: the runtime has {', '.join(sorted(ROPE_TYPES))}"
        )
    for factor in (given.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if factor not in (None, 1):
            raise UnsupportedModel(f"partial_rotary_factor is {factor}: whole heads are rotated")


def _is_neutral(value: Any) -> bool:
    """Not set, or a factor of one."""
    if value is None or value is False or value in ("", [], {}, ()):
        return True
    return isinstance(value, (int, float)) and value is not True and value == 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
