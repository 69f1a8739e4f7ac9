"""What comes out of a forward: the last norm, the LM head, and their way to the host."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hma_kernels import TILE
from sglang_hma.prefill.ttnn.card import Card
from sglang_hma.prefill.ttnn.shape import ModelShape
from sglang_hma.prefill.ttnn.tiles import tile_rows
from sglang_hma.prefill.ttnn.weights import Weights

# Rows that go through the LM head at once where every token's logits are asked for.
HEAD_ROWS = 128


class Output:
    """`norm` (x, name) is the model's, `fast` the compute configuration of products, `rows_of`
    gathers the rows of a table that ids name."""

    def __init__(
        self,
        card: Card,
        shape: ModelShape,
        weights: Weights,
        *,
        norm: Callable[[Any, str], Any],
        rows_of: Callable[[Any, Any], Any],
        fast: Any,
    ) -> None:
        self.card, self.shape, self.weights = card, shape, weights
        self.norm, self.rows_of, self.fast = norm, rows_of, fast

    def last_logits(self, streams: Sequence[Any], rows: Any) -> Any:
        """Of each block's residual stream the rows that `buckets.Inputs.rows` (on the card) names:
        [1, 1, 32 a block, a chip's vocabulary]."""
        import ttnn

        parts = []
        for index, x in enumerate(streams):
            lasts = ttnn.slice(rows, [2, TILE * index], [3, TILE * (index + 1)])
            parts.append(self.rows_of(ttnn.to_layout(x, ttnn.ROW_MAJOR_LAYOUT), lasts))
        x = parts[0] if len(parts) == 1 else ttnn.concat(parts, dim=2)
        return self._head(self.norm(x, "norm"))

    def read_logits(self, logits: Any) -> torch.Tensor:
        """BF16 [rows, vocab] on the host."""
        import ttnn

        self.card.wait()
        parts = ttnn.ConcatMeshToTensor(self.card.device, dim=-1)
        return ttnn.to_torch(logits, mesh_composer=parts)[0, 0, :, : self.shape.vocab]

    def hidden(self, x: Any) -> torch.Tensor:
        """A residual stream [1, 1, rows, hidden], normed: BF16 [rows, hidden] on the host."""
        return self.read(self.norm(x, "norm"))

    def read(self, x: Any) -> torch.Tensor:
        """All rows of a tensor [1, 1, rows, hidden], on the host."""
        import ttnn

        self.card.wait()
        on_host = ttnn.from_device(ttnn.get_device_tensors(x)[0])
        return tile_rows(on_host, self.shape.hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """BF16 [rows, hidden] on the host -> [rows, vocab] through the LM head on the card."""
        import ttnn

        found = hidden.new_empty(len(hidden), self.shape.vocab)
        for begin in range(0, len(hidden), HEAD_ROWS):
            part = hidden[begin : begin + HEAD_ROWS]
            padded = hidden.new_zeros(1, 1, HEAD_ROWS, self.shape.hidden)
            padded[0, 0, : len(part)] = part
            x = self.card.tensor(padded.bfloat16(), ttnn.bfloat16, ttnn.TILE_LAYOUT)
            logits = self.read_logits(self._head(x))
            found[begin : begin + len(part)] = logits[: len(part)]
        return found

    def _head(self, x: Any) -> Any:
        """In DRAM: a trace's logits stay allocated."""
        import ttnn

        return ttnn.linear(
            x,
            self.weights["lm_head"],
            dtype=ttnn.bfloat16,
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
            compute_kernel_config=self.fast,
        )
