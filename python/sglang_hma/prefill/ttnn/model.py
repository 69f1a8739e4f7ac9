"""The forward pass of a decoder on ttnn operations, over a paged BFP8 cache.

Values are BF16 between operations, accumulated in FP32, and BFP8 within the MLP. K and V leave the
projection in BF16 and are packed by `typecast`, which is the device packer; attention reads only
what was packed. Queries keep BF16. Rotary embeddings are in Hugging Face's order, so K's bytes are
what a GPU expects.

On a mesh each chip attends with its own heads over its own pages and has its columns of the MLP;
the residual stream is on all of them, and the two projections that return to it are summed.

Nothing here reads a value back: what an operation does depends on shapes and on what lies in the
card's memory, so the same calls serve every batch of a bucket and can be captured as a trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hma_kernels import PAGE, TILE, TILE_BYTES
from sglang_hma.prefill.ttnn.buckets import LINE, Bucket
from sglang_hma.prefill.ttnn.card import Card
from sglang_hma.prefill.ttnn.mlp import Mlp
from sglang_hma.prefill.ttnn.output import Output
from sglang_hma.prefill.ttnn.shape import BF16, ModelShape
from sglang_hma.prefill.ttnn.weights import Weights

# A value of up to so many bytes a core lies in the cores' memory (1.5 MB each), a larger one in
# DRAM. What an operation needs there for itself is known once it is made: where the first does not
# leave enough, a lane takes the next.
CORE_BYTES = (208 << 10, 96 << 10, 0)

# K and V of each layer: BFP8 [pages, a chip's kv_heads, 32, head_dim]; page 0 takes what rows that
# are no new token write
Cache = Sequence[tuple[Any, Any]]


def empty_cache(card: Card, shape: ModelShape, pages: int) -> Cache:
    """Zeros on the card."""
    import ttnn

    heads = shape.split(card.chips).kv_heads

    def one() -> Any:
        return ttnn.zeros(
            ttnn.Shape([pages, heads, PAGE, shape.head_dim]),
            dtype=ttnn.bfloat8_b,
            layout=ttnn.TILE_LAYOUT,
            device=card.device,
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
        )

    return [(one(), one()) for _ in range(shape.layers)]


def rotary_embedding(config: Any) -> Any:
    """(any tensor, positions [1, n]) -> cosines and sines [1, n, head_dim], scaling included."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    # What stays within the context that longrope's short factors are for (config_fields.py) may be
    # padded beyond it, and does not get the long ones for that.
    rotary.rope_type = "default"
    return rotary


@dataclass
class Block:
    """Rows that one operation goes over, of one or several slots: on the card."""

    x: Any  # residual stream [1, 1, rows, hidden]
    cos: Any  # [1, 1, rows, head_dim]
    sin: Any
    fill_table: Any  # pages that the rows are written to, [1, rows / 32]
    slots: list[tuple[Any, Any]]  # page table [1, width] and start [1] of each


class PrefillModel:
    """Weights on a card and what is done with them.

    context: positions that rotary tables are made for.
    """

    def __init__(
        self, card: Card, shape: ModelShape, weights: Weights, rotary: Any, *, context: int
    ) -> None:
        import ttnn

        self.card, self.shape, self.weights = card, shape, weights
        self.part = shape.split(card.chips)
        # ttnn takes a float that float32 holds exactly, and no other.
        self.scale = float(np.float32(shape.head_dim**-0.5))
        grid = card.device.compute_with_storage_grid_size()
        self.grid, self.cores, self.core_bytes = grid, grid.x * grid.y, CORE_BYTES[0]
        # HiFi2 drops the last bit of an activation. In products with packed weights, nearly all of
        # the work, that is less than what packing rounds off. HiFi3 drops only last bit times last
        # bit, and not HiFi4, which a Wormhole gets wrong with FP32 sums (tt-metal issue 38306).
        self.fast, self.exact = (
            ttnn.init_device_compute_kernel_config(
                card.device.arch(),
                math_fidelity=fidelity,
                math_approx_mode=False,
                fp32_dest_acc_en=True,
                packer_l1_acc=True,
            )
            for fidelity in (ttnn.MathFidelity.HiFi2, ttnn.MathFidelity.HiFi3)
        )
        cos, sin = rotary(torch.zeros(1), torch.arange(context)[None])
        self.context = context
        self.cos, self.sin = (
            self.card.tensor(table[0].bfloat16(), ttnn.bfloat16, ttnn.ROW_MAJOR_LAYOUT)
            for table in (cos, sin)
        )
        self.output = Output(
            *(card, shape, weights), norm=self._norm, rows_of=self._rows_of, fast=self.fast
        )
        self.mlp = Mlp(
            self.part, weights, self._linear, self._summed_linear, self._place, self.exact
        )

    def blocks(self, bucket: Bucket, rows: Any, tables: Any) -> list[Block]:
        """From what `buckets.Inputs` puts on the card."""
        import ttnn

        size, width = bucket.block_rows, tables.shape[1] - LINE
        found = []
        for index in range(bucket.blocks):
            begin, end = index * size, (index + 1) * size
            ids, positions = (ttnn.slice(rows, [row, begin], [row + 1, end]) for row in (0, 1))
            cos, sin = (self._rows_of(table, positions) for table in (self.cos, self.sin))
            slots = []
            first = index * bucket.block_slots
            for slot in range(first, first + bucket.block_slots):
                table = ttnn.slice(tables, [slot, 0], [slot + 1, width])
                start = ttnn.slice(tables, [slot, width], [slot + 1, width + 1])
                slots.append((table, ttnn.reshape(start, (1,))))
            pages = [bucket.slots, begin // PAGE], [bucket.slots + 1, end // PAGE]
            found.append(
                Block(
                    x=self._rows_of(self.weights["embedding"], ids),
                    cos=cos,
                    sin=sin,
                    fill_table=ttnn.slice(tables, *pages),
                    slots=slots,
                )
            )
        return found

    def _rows_of(self, table: Any, ids: Any) -> Any:
        """[1, 1, n, columns] for ids [1, n]."""
        import ttnn

        found = ttnn.embedding(ids, table, layout=ttnn.TILE_LAYOUT, dtype=ttnn.bfloat16)
        return ttnn.reshape(found, (1, 1, ids.shape[-1], table.shape[-1]))

    def attention_config(self, bucket: Bucket) -> Any:
        import ttnn

        return ttnn.SDPAProgramConfig(
            compute_with_storage_grid_size=self.grid,
            q_chunk_size=bucket.attention,
            k_chunk_size=bucket.attention,
            exp_approx_mode=False,
        )

    def layer(
        self, index: int, block: Block, kv: tuple[Any, Any], attention: Any
    ) -> tuple[Any, Any]:
        """The block's residual stream goes through one layer, in its place; the layer's packed K
        and V of the block, [1, a chip's kv_heads, rows, head_dim]."""
        import ttnn

        place = self._place
        h = self._norm(block.x, f"{index}.attention_norm")
        qkv = self._linear(h, f"{index}.wqkv")
        del h
        q, k, v = ttnn.experimental.nlp_create_qkv_heads(
            qkv,
            num_heads=self.part.heads,
            num_kv_heads=self.part.kv_heads,
            transpose_k_heads=False,
            memory_config=place(qkv.shape),
        )
        del qkv
        if self.shape.qk_norm:
            q, k = self._norm(q, f"{index}.q_norm"), self._norm(k, f"{index}.k_norm")
        q, k = (
            ttnn.experimental.rotary_embedding_hf(
                *(x, block.cos, block.sin),
                is_decode_mode=False,
                memory_config=place(x.shape),
                compute_kernel_config=self.exact,
            )
            for x in (q, k)
        )
        # They stay until they were copied to the host: not in the cores' memory.
        packed = [
            ttnn.typecast(x, ttnn.bfloat8_b, memory_config=ttnn.DRAM_MEMORY_CONFIG) for x in (k, v)
        ]
        del k, v
        for pages, new in zip(kv, packed, strict=True):
            ttnn.experimental.paged_fill_cache(pages, new, block.fill_table, batch_idx=0)
        attended = self._attended(q, block, kv, attention)
        del q
        joined = ttnn.experimental.nlp_concat_heads(attended, memory_config=place(attended.shape))
        del attended
        # The residual stream lives longest: in DRAM.
        x = ttnn.add(
            *(block.x, self._summed_linear(joined, f"{index}.wo")),
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
        )
        del joined
        more = self.mlp(index, self._norm(x, f"{index}.mlp_norm"))
        ttnn.add(x, more, output_tensor=block.x)
        return packed[0], packed[1]

    def _attended(self, q: Any, block: Block, kv: tuple[Any, Any], attention: Any) -> Any:
        import ttnn

        _, heads, rows, dim = q.shape
        tokens = rows // len(block.slots)
        parts = []
        for slot, (table, start) in enumerate(block.slots):
            part = q
            if len(block.slots) > 1:
                begin, end = slot * tokens, (slot + 1) * tokens
                part = ttnn.slice(q, [0, 0, begin, 0], [1, heads, end, dim])
            parts.append(
                ttnn.transformer.chunked_scaled_dot_product_attention(
                    *(part, *kv, table),
                    chunk_start_idx_tensor=start,
                    scale=self.scale,
                    program_config=attention,
                    memory_config=self._place(part.shape),
                    compute_kernel_config=self.exact,
                )
            )
        if len(parts) == 1:
            return parts[0]
        return ttnn.concat(parts, dim=2, memory_config=self._place(q.shape))

    def _linear(self, x: Any, name: str, dtype: Any = None) -> Any:
        """With its bias, if it has one; BF16 unless another type is asked for."""
        return self._product(x, name, self.weights.get(f"{name}_bias"), dtype)

    def _summed_linear(self, x: Any, name: str) -> Any:
        """Over the chips, each of which has a part of every value; the bias comes after that."""
        import ttnn

        bias = self.weights.get(f"{name}_bias")
        if self.card.chips == 1:
            return self._product(x, name, bias)
        whole = ttnn.all_reduce(self._product(x, name, None))
        return whole if bias is None else ttnn.add(whole, bias)

    def _product(self, x: Any, name: str, bias: Any, dtype: Any = None) -> Any:
        import ttnn

        weight, dtype = self.weights[name], dtype or ttnn.bfloat16
        shape = 1, 1, x.shape[2], weight.shape[-1]
        return ttnn.linear(
            x,
            weight,
            bias=bias,
            dtype=dtype,
            memory_config=self._place(shape, packed=dtype == ttnn.bfloat8_b),
            compute_kernel_config=self.fast,
        )

    def _norm(self, x: Any, name: str) -> Any:
        import ttnn

        return ttnn.rms_norm(
            x,
            epsilon=self.shape.eps,
            weight=self.weights[name],
            memory_config=self._place(x.shape),
            compute_kernel_config=self.exact,
        )

    def _place(self, shape: Sequence[int], *, packed: bool = False) -> Any:
        """Where a value of this shape goes."""
        import ttnn

        tiles = int(np.prod(tuple(shape))) // TILE**2
        size = tiles * (TILE_BYTES if packed else TILE**2 * BF16)
        fits = size <= self.core_bytes * self.cores
        return ttnn.L1_MEMORY_CONFIG if fits else ttnn.DRAM_MEMORY_CONFIG
