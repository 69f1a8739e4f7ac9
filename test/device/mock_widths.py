"""Prefills a layer of a published model's widths on described cards.

The memory of a core is described too: an operation that would not fit there is refused.
"""

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from sglang_hma.prefill.ttnn.card import opened
from sglang_hma.prefill.ttnn.chunk import Chunk
from test.prefill.models import on_card

CHUNKS = [(32, 0), (96, 32), (2048, 0), (8192, 0), (2048, 8192), (8192, 24576)]


def zeros(hidden: int, heads: int, kv_heads: int, intermediate: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        head_dim=128,
        vocab_size=512,
        num_hidden_layers=1,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    return model.bfloat16().to_empty(device="cpu").apply(_zero)


def _zero(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.zero_()


def chunks_taken(chips: int, *widths: int) -> list[tuple[int, int]]:
    taken = []
    with opened(range(chips), chips) as card:
        runtime = on_card(card, zeros(*widths), pages=1025)
        for length, start in CHUNKS:
            pages = np.arange(1, 1 + (start + length) // 32)
            runtime.prefill([Chunk(np.zeros(length, np.int64), start, pages)], last=True)
            taken.append((length, start))
    return taken
