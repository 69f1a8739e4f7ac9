"""The dimensions of a dense decoder, as its config gives them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderDims:
    """With rotary embeddings and grouped-query attention. tied: the output head's weights are the
    embedding's."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool


def dims_of(config: Any) -> dict[str, Any]:
    """The fields of DecoderDims from a transformers config, or any object with its attributes.

    Raises AttributeError for one that is missing.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    return {
        "layers": config.num_hidden_layers,
        "hidden": hidden,
        "intermediate": config.intermediate_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or hidden // heads,
        "vocab": config.vocab_size,
        "tied": bool(getattr(config, "tie_word_embeddings", False)),
    }
