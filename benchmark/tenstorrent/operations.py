"""Operations of ttnn that the recorder knows: what each gives back and what it costs.

To add one: a function of ttnn's own arguments that returns Work, under its name in OPERATIONS. If a
simple one moves every operand and its result once, `_like` or `_binary` may be enough. Work says
what the results look like; reads and writes are every operand in DRAM once and every result in DRAM
once, unless it says otherwise. An operand in L1 costs none. Results go where the first operand is,
but for linear, concat and attention, whose go to DRAM: ttnn 0.81.1 on a described card.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmark.tenstorrent.tensors import DRAM, TILE_LAYOUT, Memory, Shape, Tensor, size
from hma_kernels.layout import TILE


@dataclass(frozen=True)
class Out:
    """A result. memory: where it goes if the call does not say."""

    shape: Sequence[int]
    dtype: str
    layout: str = TILE_LAYOUT
    memory: Memory = DRAM
    integers: torch.Tensor | None = None


@dataclass(frozen=True)
class Work:
    """kind: matmul, attention, other; or view, which moves nothing and has no program. reads: bytes
    from DRAM, None for every operand once. writes: bytes to DRAM into operands, beside the results.
    flops: of the matrix engine. weight: what a matmul multiplies with. link: bytes between chips.
    gives: an operand that was written to and is given back.
    """

    outs: tuple[Out, ...] = ()
    kind: str = "other"
    reads: int | None = None
    writes: int = 0
    flops: int = 0
    weight: Tensor | None = None
    link: int = 0
    programs: int = 1
    gives: Tensor | None = None


def _like(x: Tensor, *_: Any, dtype: str | None = None, **__: Any) -> Work:
    """As the first operand is; further operands are read."""
    return Work((_as(x, dtype),))


def _as(x: Tensor, dtype: Any = None, layout: str | None = None) -> Out:
    return Out(x.shape, dtype or x.dtype, layout or x.layout, x.memory or DRAM)


def _binary(a: Tensor, b: Any, *_: Any, dtype: str | None = None, **__: Any) -> Work:
    shape: Sequence[int] = a.shape
    if isinstance(b, Tensor) and b.shape != a.shape:
        shape = np.broadcast_shapes(a.shape, b.shape)
    return Work((Out(shape, dtype or a.dtype, a.layout, a.memory or DRAM),))


def _typecast(x: Tensor, dtype: str, *_: Any, **__: Any) -> Work:
    return Work((_as(x, dtype),))


def _embedding(
    ids: Tensor, table: Tensor, *, layout: Any = None, dtype: Any = None, **_: Any
) -> Work:
    """Reads a row of the table for each id."""
    rows = math.prod(ids.shape) * size((table.shape[-1],), table.dtype, "ROW_MAJOR")
    shape = (*ids.shape, table.shape[-1])
    out = Out(shape, dtype or table.dtype, layout or table.layout, ids.memory or DRAM)
    return Work((out,), reads=ids.dram + (rows if table.dram else 0))


def _linear(a: Tensor, b: Tensor, *, dtype: Any = None, **_: Any) -> Work:
    """2 M K N operations of the matrix engine, rows padded to tiles."""
    rows = math.prod(a.padded_shape[:-1])
    flops = 2 * rows * b.padded_shape[-2] * b.padded_shape[-1]
    out = Out((*a.shape[:-1], b.shape[-1]), dtype or a.dtype)
    return Work((out,), "matmul", flops=flops, weight=b)


def _create_heads(qkv: Tensor, *_: Any, num_heads: int, num_kv_heads: int, **__: Any) -> Work:
    batch, _one, rows, width = qkv.shape
    dim = width // (num_heads + 2 * num_kv_heads)
    shapes = [(batch, heads, rows, dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return Work(tuple(Out(shape, qkv.dtype, qkv.layout, qkv.memory or DRAM) for shape in shapes))


def _concat_heads(x: Tensor, **_: Any) -> Work:
    batch, heads, rows, dim = x.shape
    return Work((Out((batch, 1, rows, heads * dim), x.dtype, x.layout, x.memory or DRAM),))


def _paged_fill(cache: Tensor, new: Tensor, table: Tensor, **_: Any) -> Work:
    """Reads what is new and writes it into the cache's pages."""
    written = new.bytes if cache.dram else 0
    return Work(reads=new.dram + table.dram, writes=written, gives=cache)


def _chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    chunk_start_idx_tensor: Tensor,
    program_config: Any = None,
    **_: Any,
) -> Work:
    """Of q [batch, heads, rows, dim] behind as many tokens as the tensor says.

    Each chunk of q_chunk_size queries of each query head goes over whole chunks of k_chunk_size
    keys up to its last query, and reads K and V of its own: the vendor's kernel (tt-metal,
    sdpa/device/kernels/dataflow/reader_interleaved.cpp) shares nothing between the query heads of a
    KV head, nor between chunks of queries. Keys beyond the last token are not read. Q and the
    result are moved once. Both products count on whole chunks, masked halves included.
    """
    if chunk_start_idx_tensor.integers is None:
        raise RuntimeError("where the chunk starts is no value that came from the host")
    first = int(chunk_start_idx_tensor.integers.flatten()[0])
    queries, keys = (getattr(program_config, f"{each}_chunk_size", TILE) for each in "qk")
    batch, heads, rows, dim = q.padded_shape
    ends = [first + end for end in range(queries, rows + queries, queries)]
    extents = [-(-end // keys) * keys for end in ends]
    seen = sum(min(extent, first + rows) for extent in extents)
    row_bytes = [size((TILE, dim), each.dtype, TILE_LAYOUT) / TILE for each in (k, v) if each.dram]
    reads = q.dram + table.dram + int(batch * heads * seen * sum(row_bytes))
    flops = 4 * batch * heads * dim * queries * sum(extents)
    return Work((Out(q.shape, q.dtype),), "attention", reads=reads, flops=flops)


def _reshape(x: Tensor, shape: Sequence[int], *_: Any, **__: Any) -> Work:
    """A view where the last two dimensions stay, or rows go on without padding (ttnn.reshape)."""
    known = math.prod(each for each in shape if each != -1)
    whole = Shape(each if each != -1 else math.prod(x.shape) // known for each in shape)
    rows = [each[-2] if len(each) > 1 else 1 for each in (x.shape, whole)]
    same_rows = rows[0] == rows[1] or all(each % TILE == 0 for each in rows)
    view = x.shape[-1] == whole[-1] and (x.layout != TILE_LAYOUT or same_rows)
    integers = None if x.integers is None else x.integers.reshape(whole)
    out = Out(whole, x.dtype, x.layout, x.memory or DRAM, integers)
    return _view(out) if view else Work((out,))


def _slice(
    x: Tensor, begin: Sequence[int], end: Sequence[int], step: Any = None, *_: Any, **__: Any
) -> Work:
    """Reads what it writes."""
    steps = step or [1] * len(begin)
    cut = tuple(slice(*each) for each in zip(begin, end, steps, strict=True))
    shape = [len(range(*each.indices(n))) for each, n in zip(cut, x.shape, strict=True)]
    integers = None if x.integers is None else x.integers[cut]
    out = Out(shape, x.dtype, x.layout, x.memory or DRAM, integers)
    if tuple(shape) == x.shape:
        return _view(out)
    return Work((out,), reads=size(tuple(shape), x.dtype, x.layout) if x.dram else 0)


def _concat(parts: Sequence[Tensor], dim: int = 0, *_: Any, **__: Any) -> Work:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Work((Out(shape, parts[0].dtype, parts[0].layout),))


def _to_layout(x: Tensor, layout: str, dtype: Any = None, *_: Any, **__: Any) -> Work:
    return _moved(x, _as(x, dtype, layout))


def _moved(x: Tensor, out: Out) -> Work:
    """Nothing is done where nothing changes."""
    asked = (tuple(out.shape), out.dtype, out.layout, out.memory)
    same = asked == (tuple(x.shape), x.dtype, x.layout, x.memory)
    return _view(out) if same else Work((out,))


def _view(out: Out) -> Work:
    return Work((out,), kind="view", reads=0, programs=0)


def _topk(x: Tensor, k: int, dim: int = -1, **_: Any) -> Work:
    """Values and where they were."""
    shape = list(x.shape)
    shape[dim] = k
    place, numbers = x.memory or DRAM, "uint32" if x.dtype == "float32" else "uint16"
    return Work((Out(shape, x.dtype, x.layout, place), Out(shape, numbers, x.layout, place)))


def _scatter(x: Tensor, _dim: int, index: Tensor, source: Tensor, *_: Any, **__: Any) -> Work:
    """Its operands are laid out in rows and scattered, and the result in tiles: five programs,
    each of which reads and writes where x is."""
    rows = sum(each.dram for each in (x, index, source))
    between = rows + x.dram if x.dram else 0
    return Work((_as(x),), reads=rows + between, writes=between, programs=5)


def _where(condition: Tensor, a: Any, b: Any, **_: Any) -> Work:
    values = next((each for each in (a, b) if isinstance(each, Tensor)), condition)
    return _binary(condition, values, dtype=values.dtype)


def _all_reduce(x: Tensor, *_: Any, **__: Any) -> Work:
    """A reduce-scatter and an all-gather: each chip sends all but its own part twice."""
    chips = x.on.chips
    sent = 2 * x.bytes * (chips - 1) // chips
    return Work((_as(x),), link=sent, programs=2)


OPERATIONS: dict[str, Callable[..., Work]] = {
    "add": _binary,
    "all_reduce": _all_reduce,
    "concat": _concat,
    "embedding": _embedding,
    "experimental.nlp_concat_heads": _concat_heads,
    "experimental.nlp_create_qkv_heads": _create_heads,
    "experimental.paged_fill_cache": _paged_fill,
    "experimental.rotary_embedding_hf": _like,
    "ge": _binary,
    "linear": _linear,
    "lt": _binary,
    "mul": _binary,
    "reshape": _reshape,
    "rms_norm": _like,
    "scatter": _scatter,
    "slice": _slice,
    "softmax": _like,
    "to_layout": _to_layout,
    "topk": _topk,
    "transformer.chunked_scaled_dot_product_attention": _chunked_attention,
    "typecast": _typecast,
    "where": _where,
}
