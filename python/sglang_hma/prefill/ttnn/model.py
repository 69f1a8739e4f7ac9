"""The forward pass of a decoder on ttnn operations, over a paged BFP8 cache.

Values are BF16 between operations, accumulated in FP32. K and V leave the projection in BF16 and
are packed by `typecast`, which is the device packer; attention reads only what was packed. Queries
keep BF16. Rotary embeddings are in Hugging Face's order, so K's bytes are what a GPU expects.

Layers go over all requests before the next layer starts: a layer's pages are final together.

On a mesh each chip attends with its own heads over its own pages and has its columns of the MLP;
the residual stream is on all of them, and the two projections that return to it are summed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hma_kernels import PAGE, TILE
from sglang_hma.prefill.ttnn.card import Card
from sglang_hma.prefill.ttnn.mlp import Mlp
from sglang_hma.prefill.ttnn.shape import ModelShape, bucket, page_bucket, pages_of
from sglang_hma.prefill.ttnn.tiles import tile_rows
from sglang_hma.prefill.ttnn.weights import Weights

LARGEST_ATTENTION_CHUNK = 128


@dataclass(frozen=True)
class Chunk:
    """New tokens of one request.

    tokens: int [n], n >= 1; start: tokens before them, a multiple of 32; pages: the request's page
    ids from its first token on, at least ceil((start + n) / 32).
    """

    tokens: npt.NDArray[np.integer]
    start: int
    pages: npt.NDArray[np.integer]

    def __post_init__(self) -> None:
        if self.start % PAGE:
            raise ValueError(f"a chunk starts at token {self.start}, no multiple of {PAGE}")
        if not len(self.tokens) or len(self.pages) < pages_of(self.start + len(self.tokens)):
            raise ValueError(
                f"{len(self.tokens)} tokens from {self.start} on {len(self.pages)} pages"
            )

    @property
    def own_pages(self) -> npt.NDArray[np.integer]:
        """Pages that the new tokens are written to."""
        return self.pages[self.start // PAGE : pages_of(self.start + len(self.tokens))]


@dataclass
class _OnCard:
    """A chunk's inputs and its residual stream on the card."""

    x: Any
    cos: Any
    sin: Any
    fill_table: Any
    page_table: Any
    start: Any
    attention: Any


# (layer, one (K, V) pair a chunk): packed tensors [1, a chip's kv_heads, padded length, head_dim]
Stored = Callable[[int, list[tuple[Any, Any]]], None]
After = Callable[[int, list[Any]], None]


# K and V of each layer: BFP8 [pages, a chip's kv_heads, 32, head_dim]; page 0 takes what padding
# writes
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


class PrefillModel:
    """Weights on a card and what is done with them."""

    def __init__(self, card: Card, shape: ModelShape, weights: Weights, rotary: Any) -> None:
        import ttnn

        self.card, self.shape, self.weights, self.rotary = card, shape, weights, rotary
        self.part = shape.split(card.chips)
        # ttnn takes a float that float32 holds exactly, and no other.
        self.scale = float(np.float32(shape.head_dim**-0.5))
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
        self.mlp = Mlp(self.part, weights, self._linear, self._summed_linear, self.exact)

    def forward(
        self, chunks: Sequence[Chunk], cache: Cache, stored: Stored, after: After | None = None
    ) -> list[Any]:
        """The residual stream after the last layer, [1, 1, padded length, hidden] a chunk.

        `stored`, and `after` with the residual streams, are called after each layer was enqueued,
        not when it has run.
        """
        on_card = [self._upload(chunk) for chunk in chunks]
        for layer, kv in enumerate(cache):
            stored(layer, [self._layer(layer, chunk, *kv) for chunk in on_card])
            if after is not None:
                after(layer, [chunk.x for chunk in on_card])
        return [chunk.x for chunk in on_card]

    def hidden(self, x: Any, first: int, rows: int) -> torch.Tensor:
        """Normed rows first.. of a residual stream, BF16 [rows, hidden], on the host."""
        return self.rows(self._norm(x, "norm"), first, rows)

    def rows(self, x: Any, first: int, rows: int) -> torch.Tensor:
        """Rows first.. of a tensor [1, 1, padded length, hidden], on the host."""
        import ttnn

        self.card.wait()
        # Cut on the host: on the card each place to cut at would be a program of its own.
        on_host = ttnn.from_device(ttnn.get_device_tensors(x)[0])
        begin, end = first // TILE, -(-(first + rows) // TILE)
        part = tile_rows(on_host, self.shape.hidden, begin, end)
        return part[first - begin * TILE :][:rows]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """BF16 [rows, hidden] -> [rows, vocab] through the LM head on the card."""
        import ttnn

        rows = len(hidden)
        padded = hidden.new_zeros(bucket(rows), self.shape.hidden)
        padded[:rows] = hidden
        x = self._tensor(padded[None, None].bfloat16(), ttnn.bfloat16, ttnn.TILE_LAYOUT)
        parts = ttnn.ConcatMeshToTensor(self.card.device, dim=-1)
        product = self._linear(x, "lm_head")
        self.card.wait()
        logits = ttnn.to_torch(product, mesh_composer=parts)
        return logits[0, 0, :rows, : self.shape.vocab]

    def _upload(self, chunk: Chunk) -> _OnCard:
        import ttnn

        length = bucket(len(chunk.tokens))
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(chunk.tokens)] = chunk.tokens
        fill = np.zeros((1, length // PAGE), np.int32)
        fill[0, : len(chunk.own_pages)] = chunk.own_pages
        seen = pages_of(chunk.start + len(chunk.tokens))
        pages = np.zeros((1, page_bucket(chunk.start // PAGE + length // PAGE)), np.int32)
        pages[0, :seen] = chunk.pages[:seen]
        position = torch.arange(chunk.start, chunk.start + length)[None]
        cos, sin = (t[None].bfloat16() for t in self.rotary(torch.zeros(1), position))

        row, tile = ttnn.ROW_MAJOR_LAYOUT, ttnn.TILE_LAYOUT
        ids = self._tensor(torch.from_numpy(tokens), ttnn.uint32, row)
        x = ttnn.embedding(ids, self.weights["embedding"], layout=tile, dtype=ttnn.bfloat16)
        return _OnCard(
            x=ttnn.reshape(x, (1, 1, length, self.shape.hidden)),
            cos=self._tensor(cos, ttnn.bfloat16, tile),
            sin=self._tensor(sin, ttnn.bfloat16, tile),
            fill_table=self._tensor(torch.from_numpy(fill), ttnn.int32, row),
            page_table=self._tensor(torch.from_numpy(pages), ttnn.int32, row),
            start=self._tensor(torch.tensor([chunk.start], dtype=torch.int32), ttnn.int32, row),
            attention=self._attention_config(chunk.start, length),
        )

    def _attention_config(self, start: int, length: int) -> Any:
        """Attention goes over as many tokens at once as divide both its start and its length."""
        import ttnn

        tokens = LARGEST_ATTENTION_CHUNK
        while start % tokens or length % tokens:
            tokens //= 2
        return ttnn.SDPAProgramConfig(
            compute_with_storage_grid_size=self.card.device.compute_with_storage_grid_size(),
            q_chunk_size=tokens,
            k_chunk_size=tokens,
            exp_approx_mode=False,
        )

    def _layer(self, layer: int, chunk: _OnCard, keys: Any, values: Any) -> tuple[Any, Any]:
        import ttnn

        shape = self.part
        qkv = self._linear(self._norm(chunk.x, f"{layer}.attention_norm"), f"{layer}.wqkv")
        q, k, v = ttnn.experimental.nlp_create_qkv_heads(
            qkv, num_heads=shape.heads, num_kv_heads=shape.kv_heads, transpose_k_heads=False
        )
        if shape.qk_norm:
            q, k = self._norm(q, f"{layer}.q_norm"), self._norm(k, f"{layer}.k_norm")
        q, k = (
            ttnn.experimental.rotary_embedding_hf(
                x, chunk.cos, chunk.sin, is_decode_mode=False, compute_kernel_config=self.exact
            )
            for x in (q, k)
        )
        k8, v8 = ttnn.typecast(k, ttnn.bfloat8_b), ttnn.typecast(v, ttnn.bfloat8_b)
        for cache, packed in ((keys, k8), (values, v8)):
            ttnn.experimental.paged_fill_cache(cache, packed, chunk.fill_table, batch_idx=0)
        attended = ttnn.transformer.chunked_scaled_dot_product_attention(
            *(q, keys, values, chunk.page_table),
            chunk_start_idx_tensor=chunk.start,
            scale=self.scale,
            program_config=chunk.attention,
            compute_kernel_config=self.exact,
        )
        joined = ttnn.experimental.nlp_concat_heads(attended)
        x = ttnn.add(chunk.x, self._summed_linear(joined, f"{layer}.wo"))
        chunk.x = ttnn.add(x, self.mlp(layer, self._norm(x, f"{layer}.mlp_norm")))
        return k8, v8

    def _linear(self, x: Any, name: str) -> Any:
        """With its bias, if it has one."""
        return self._product(x, name, self.weights.get(f"{name}_bias"))

    def _summed_linear(self, x: Any, name: str) -> Any:
        """Over the chips, each of which has a part of every value; the bias comes after that."""
        import ttnn

        bias = self.weights.get(f"{name}_bias")
        if self.card.chips == 1:
            return self._product(x, name, bias)
        whole = ttnn.all_reduce(self._product(x, name, None))
        return whole if bias is None else ttnn.add(whole, bias)

    def _product(self, x: Any, name: str, bias: Any) -> Any:
        import ttnn

        return ttnn.linear(
            x,
            self.weights[name],
            bias=bias,
            dtype=ttnn.bfloat16,
            compute_kernel_config=self.fast,
        )

    def _norm(self, x: Any, name: str) -> Any:
        import ttnn

        return ttnn.rms_norm(
            x,
            epsilon=self.shape.eps,
            weight=self.weights[name],
            compute_kernel_config=self.exact,
        )

    def _tensor(self, value: torch.Tensor, dtype: Any, layout: Any) -> Any:
        import ttnn

        device = self.card.device
        everywhere = ttnn.ReplicateTensorToMesh(device)
        return ttnn.from_torch(
            value, dtype=dtype, layout=layout, device=device, mesh_mapper=everywhere
        )
