"""Small random models and what transformers makes of them in float32."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sglang_hma.prefill.ttnn.card import Card
from sglang_hma.prefill.ttnn.model import Chunk, PrefillModel, empty_cache, rotary_embedding
from sglang_hma.prefill.ttnn.readback import Readback
from sglang_hma.prefill.ttnn.shape import ModelShape, pages_of
from sglang_hma.prefill.ttnn.weights import Weights

KINDS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def random_model(kind: str, *, layers: int = 2, head_dim: int = 64, tied: bool = False) -> Any:
    """Weights that BF16 holds, as float32; norms away from 1, biases away from 0."""
    make_config, make_model = KINDS[kind]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    if kind == "qwen2":
        sizes["hidden_size"] = 4 * head_dim
    config = make_config(
        **sizes,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.06,
        architectures=[make_model.__name__],
    )
    model = make_model(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
    return model.bfloat16().float()


@dataclass
class Result:
    """logits [n, vocab]; K and V of each layer [kv_heads, n, head_dim]; `pages` as they arrived."""

    logits: torch.Tensor
    kv: list[tuple[torch.Tensor, torch.Tensor]]


def by_transformers(model: Any, tokens: np.ndarray) -> Result:
    with torch.no_grad():
        out = model(torch.from_numpy(tokens)[None].long(), use_cache=True)
    layers = out.past_key_values.layers
    return Result(out.logits[0], [(layer.keys[0], layer.values[0]) for layer in layers])


class OnCard:
    """A model on a card, and a pool of host pages beside it."""

    def __init__(self, card: Card, hf: Any, *, pages: int = 64) -> None:
        self.card, self.shape = card, ModelShape.of(hf.config)
        weights = Weights(self.shape, card.device, None, bfp8=True)
        weights.load(hf.state_dict().items())
        self.model = PrefillModel(card, self.shape, weights, rotary_embedding(hf.config))
        self.cache = empty_cache(card, self.shape, pages)
        size = (pages, self.shape.kv_heads, self.shape.head_dim // 32, 1088)
        self.host = [
            tuple(torch.zeros(size, dtype=torch.uint8) for _ in "kv")
            for _ in range(self.shape.layers)
        ]
        self.stored: list[int] = []

    def prefill(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        """Logits of each chunk's tokens."""
        readback = Readback(self.card.device, self._store, self.stored.append)
        own = [chunk.own_pages for chunk in chunks]
        streams = self.model.forward(
            chunks,
            self.cache,
            lambda layer, pairs: readback.submit(layer, list(zip(own, pairs, strict=True))),
        )
        logits = [
            self.model.logits(self.model.hidden(stream, 0, len(chunk.tokens)))
            for chunk, stream in zip(chunks, streams, strict=True)
        ]
        readback.drain()
        readback.close()
        return logits

    def _store(self, layer: int, which: int, pages: Any, rows: torch.Tensor) -> None:
        self.host[layer][which][torch.from_numpy(pages.astype(np.int64))] = rows


def split(tokens: np.ndarray, cuts: list[int], pages: np.ndarray) -> list[Chunk]:
    """Chunks of one request, cut at multiples of 32."""
    ends = [*cuts, len(tokens)]
    return [
        Chunk(tokens[begin:end], begin, pages[: pages_of(end)])
        for begin, end in zip([0, *cuts], ends, strict=True)
    ]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's."""
    return float(np.corrcoef(a.double().flatten().numpy(), b.double().flatten().numpy())[0, 1])
