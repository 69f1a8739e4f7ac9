"""The runtime without a server: a model on a card, its cache, and host pages beside it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hma_kernels import PAGE, TILE, TILE_BYTES
from sglang_hma.config import WeightFormats
from sglang_hma.prefill.ttnn.card import Card
from sglang_hma.prefill.ttnn.chunk import Chunk, pages_of
from sglang_hma.prefill.ttnn.config_fields import check_fields
from sglang_hma.prefill.ttnn.model import PrefillModel, empty_cache, rotary_embedding
from sglang_hma.prefill.ttnn.readback import store_pages
from sglang_hma.prefill.ttnn.runner import Runner
from sglang_hma.prefill.ttnn.shape import ModelShape
from sglang_hma.prefill.ttnn.weights import Weights

ALL_BFP8 = WeightFormats()


class OfflinePrefill:
    """host[layer] is (K, V): uint8 [pages, kv_heads, head_dim / 32, 1088]; `stored` the layers that
    have arrived there, in order. `pages` counts page 0, which takes padding."""

    def __init__(
        self,
        card: Card,
        config: Any,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        pages: int,
        formats: WeightFormats = ALL_BFP8,
        chunk_tokens: int = 8192,
    ) -> None:
        check_fields(config)
        self.card, self.shape = card, ModelShape.of(config)
        weights = Weights(self.shape, card, None, formats)
        weights.load(tensors)
        context = min(config.max_position_embeddings, pages * PAGE)
        rotary = rotary_embedding(config)
        self.model = PrefillModel(card, self.shape, weights, rotary, context=context)
        self.cache = empty_cache(card, self.shape, pages)
        size = (pages, self.shape.kv_heads, self.shape.head_dim // TILE, TILE_BYTES)
        self.host = [
            (torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8))
            for _ in range(self.shape.layers)
        ]
        self.stored: list[int] = []
        self.runner = Runner(
            self.model, self.cache, self._store, self.stored.append, chunk_tokens=chunk_tokens
        )

    def prefill(
        self,
        chunks: Sequence[Chunk],
        *,
        last: bool = False,
        hidden: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """BF16 logits [n, vocab] of each chunk's tokens, or [1, vocab] of its last one; returns
        when all pages are in `host`. `hidden` gets what the first chunk's residual stream is after
        each layer, [n, hidden]."""
        if last:
            return [row[None] for row in self.runner.last_logits(chunks)]
        return [self.model.output.logits(rows) for rows in self.runner.hidden(chunks, hidden)]

    def close(self) -> None:
        self.runner.close()

    def _store(
        self, layer: int, which: int, pages: npt.NDArray[np.integer], head: int, rows: torch.Tensor
    ) -> None:
        store_pages(self.host[layer][which], pages, head, rows)


def as_saved(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """A transformers model's tensors as its checkpoint has them: each expert's by itself, and not
    all experts' in one, [experts, out, in]."""
    for name, value in tensors.items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".experts"):
            yield name, value
            continue
        modules = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for number, expert in enumerate(value):
            for module, part in zip(modules, expert.chunk(len(modules)), strict=True):
                yield f"{stem}.{number}.{module}.weight", part


def split(
    tokens: npt.NDArray[np.integer], cuts: Sequence[int], pages: npt.NDArray[np.integer]
) -> list[Chunk]:
    """Chunks of one request, cut at multiples of 32."""
    ends = [*cuts, len(tokens)]
    return [
        Chunk(tokens[begin:end], begin, pages[: pages_of(end)])
        for begin, end in zip([0, *cuts], ends, strict=True)
    ]
