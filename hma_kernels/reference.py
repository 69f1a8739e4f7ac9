"""The definition of the operations in numpy, against which every kernel of this package is tested.

Written to be read, one rule at a time, over integers and float64; nothing here is fast.
Source of the codec rules: the host packer (ttnn.Tensor with bfloat8_b) and the device packer
(ttnn.typecast to bfloat8_b) of Tenstorrent's ttnn 0.81.1, measured.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from hma_kernels.layout import (
    GROUP,
    PAGE,
    TILE,
    TILE_BYTES,
    Rounding,
    data_offset,
    exponent_offset,
    padded,
)

Array: TypeAlias = np.ndarray[Any, Any]


def pack(x: Array, rounding: Rounding) -> Array:
    """float32 [..., H, W] -> uint8 [..., ceil(H/32), ceil(W/32), 1088]; H, W zero-padded."""
    *lead, height, width = x.shape
    full = np.zeros((*lead, padded(height), padded(width)), np.float32)
    full[..., :height, :width] = x
    strips = full.reshape(-1, TILE, full.shape[-1] // GROUP, GROUP)
    exponents, data = (_quantize_host if rounding == "host" else _quantize_device)(strips)

    tiles_wide = full.shape[-1] // TILE
    out = np.zeros((len(strips), tiles_wide * TILE_BYTES), np.uint8)
    row, group = np.indices((TILE, 2 * tiles_wide))
    out[:, exponent_offset(row, group)] = exponents
    out[:, data_offset(row, group)[..., None] + np.arange(GROUP)] = data
    return out.reshape(*lead, full.shape[-2] // TILE, tiles_wide, TILE_BYTES)


def _quantize_host(groups: Array) -> tuple[Array, Array]:
    """float32 [..., 16] -> shared exponents uint8 [...], data bytes uint8 [..., 16]."""
    bits = groups.view(np.uint32).astype(np.int64)
    sign, exponent, fraction = bits >> 31, bits >> 23 & 0xFF, bits & 0x7FFFFF
    shared = exponent.max(-1, keepdims=True)
    mantissa = (0x800000 | fraction) >> np.minimum(shared - exponent, 31)
    q, rest = mantissa >> 17, mantissa & 0x1FFFF
    q += (rest > 0x10000) | ((rest == 0x10000) & (q % 2 == 1))
    q = np.where(exponent == 0, 0, np.minimum(q, 127))
    return shared[..., 0].astype(np.uint8), _with_sign(sign, q)


def _quantize_device(groups: Array) -> tuple[Array, Array]:
    bits = groups.view(np.uint32).astype(np.int64) >> 16
    sign, exponent, fraction = bits >> 15, bits >> 7 & 0xFF, bits & 0x7F
    is_nan = (exponent == 255) & (fraction != 0)
    fraction = np.where(is_nan, 0, fraction)
    mantissa = np.where(exponent == 0, 0, 128 | fraction)
    shared = exponent.max(-1, keepdims=True)
    shift = np.minimum(shared - exponent, 8)
    rounded = (mantissa + (1 << shift)) >> (shift + 1)
    q = np.where(shift == 8, 0, np.minimum(rounded, 127))
    return shared[..., 0].astype(np.uint8), _with_sign(sign, q)


def _with_sign(sign: Array, q: Array) -> Array:
    return np.where(q == 0, 0, sign << 7 | q).astype(np.uint8)


def unpack(tiles: Array) -> Array:
    """uint8 [..., Ht, Wt, 1088] -> float32 [..., Ht*32, Wt*32], each value exact in bfloat16."""
    *lead, tiles_high, tiles_wide, _ = tiles.shape
    strips = tiles.reshape(-1, tiles_wide * TILE_BYTES)
    row, group = np.indices((TILE, 2 * tiles_wide))
    exponents = strips[:, exponent_offset(row, group)]
    data = strips[:, data_offset(row, group)[..., None] + np.arange(GROUP)]
    values = dequantize(exponents[..., None], data)
    return values.reshape(*lead, tiles_high * TILE, tiles_wide * TILE)


def dequantize(exponents: Array, data: Array) -> Array:
    """Shared exponents and data bytes, uint8, broadcast together -> float32."""
    exponent, byte = np.broadcast_arrays(exponents.astype(np.int64), data.astype(np.int64))
    sign, q = byte >> 7, byte & 0x7F
    leading_zeros = 7 - np.frexp(q)[1]
    magnitude = (exponent - leading_zeros) << 7 | (q << (leading_zeros + 1) & 0x7F)
    bits = np.where(exponent < leading_zeros, 0, sign << 15 | magnitude)
    bits = np.where(q == 0, sign << 15, bits)
    return (bits << 16).astype(np.uint32).view(np.float32)


@dataclass(frozen=True)
class KV:
    """One layer's pages: *_bfp8 uint8 [pages, heads, dim/32, 1088], *_bf16 float [pages, heads, 32,
    dim]; the page counts differ."""

    k_bfp8: Array
    v_bfp8: Array
    k_bf16: Array
    v_bf16: Array


@dataclass(frozen=True)
class Table:
    """hma_kernels.PageTable's fields as numpy arrays."""

    bfp8_indptr: Array
    bfp8_indices: Array
    bfp8_pos: Array
    bf16_indptr: Array
    bf16_indices: Array
    bf16_pos: Array
    seq_lens: Array


def cached(kv: KV, table: Table, request: int) -> tuple[Array, Array, Array]:
    """k [n, heads, D], v [n, heads, Dv], positions [n] of one request's valid tokens; float64."""
    keys = [np.zeros((0, *kv.k_bf16.shape[1::2]))]
    values = [np.zeros((0, *kv.v_bf16.shape[1::2]))]
    positions = [np.zeros(0, np.int64)]
    for name in ("bfp8", "bf16"):
        start, stop = getattr(table, f"{name}_indptr")[request : request + 2]
        for entry in range(start, stop):
            page = getattr(table, f"{name}_indices")[entry]
            k, v = getattr(kv, f"k_{name}")[page], getattr(kv, f"v_{name}")[page]
            if name == "bfp8":
                k, v = unpack(k[:, None]), unpack(v[:, None])
            first = getattr(table, f"{name}_pos")[entry]
            rows = int(np.clip(table.seq_lens[request] - first, 0, PAGE))
            keys.append(k[:, :rows].swapaxes(0, 1).astype(np.float64))
            values.append(v[:, :rows].swapaxes(0, 1).astype(np.float64))
            positions.append(first + np.arange(rows))
    return np.concatenate(keys), np.concatenate(values), np.concatenate(positions)


def attend(
    q: Array,
    k: Array,
    v: Array,
    visible: Array,
    scale: float,
    logit_cap: float,
    sinks: Array | None = None,
) -> Array:
    """One query [Hq, D] over k [n, H, D], v [n, H, Dv], visible bool [n] -> float64 [Hq, Dv].

    Query head h reads KV head h // (Hq/H). Weights are softmax(cap * tanh(q.k * scale / cap)), with
    sinks [Hq] over one logit more, sinks[h] as it is, whose value is zero. The result is zero if
    nothing is visible.
    """
    k, v = k[visible], v[visible]
    gqa_group_size = q.shape[0] // k.shape[1]
    out = np.zeros((q.shape[0], v.shape[2]))
    if len(k) == 0:
        return out
    for head, row in enumerate(q.astype(np.float64)):
        logits = k[:, head // gqa_group_size] @ row * scale
        if logit_cap > 0:
            logits = logit_cap * np.tanh(logits / logit_cap)
        sink = -np.inf if sinks is None else float(sinks[head])
        largest = max(logits.max(), sink)
        weights = np.exp(logits - largest)
        total = weights.sum() + np.exp(sink - largest)
        out[head] = weights @ v[:, head // gqa_group_size] / total
    return out


def in_window(positions: Array, query: int, sliding_window: int) -> Array:
    """Which key positions the query at position `query` sees: none later than its own, none more
    than sliding_window (if >= 0) earlier."""
    oldest = query - sliding_window if sliding_window >= 0 else 0
    return (positions <= query) & (positions >= oldest)


def decode_attention(
    q: Array,
    kv: KV,
    table: Table,
    *,
    scale: float,
    logit_cap: float = 0.0,
    sliding_window: int = -1,
    sinks: Array | None = None,
    q_indptr: Array | None = None,
) -> Array:
    """q [B, Hq, D], one query per request at position seq_len-1 -> float64 [B, Hq, Dv].

    With q_indptr [B+1], q is [T, Hq, D] and request b's queries are rows q_indptr[b] up to
    q_indptr[b+1], the last of them at position seq_len-1.
    """
    if q_indptr is None:
        q_indptr = np.arange(len(q) + 1)
    out = np.zeros((len(q), q.shape[1], kv.v_bf16.shape[-1]))
    for request, seq_len in enumerate(table.seq_lens):
        k, v, positions = cached(kv, table, request)
        start, stop = q_indptr[request], q_indptr[request + 1]
        for row in range(start, stop):
            visible = in_window(positions, int(seq_len - (stop - row)), sliding_window)
            out[row] = attend(q[row], k, v, visible, scale, logit_cap, sinks)
    return out


def extend_attention(
    q: Array,
    k: Array,
    v: Array,
    kv: KV,
    table: Table,
    q_indptr: Array,
    *,
    scale: float,
    logit_cap: float = 0.0,
    sliding_window: int = -1,
    sinks: Array | None = None,
) -> Array:
    """New rows q [T, Hq, D], k [T, H, D], v [T, H, Dv] after each prefix -> float64 [T, Hq, Dv].

    Request b's row i has position seq_lens[b] + i and sees its prefix and its own rows up to i.
    """
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    for request, prefix in enumerate(table.seq_lens):
        start, stop = q_indptr[request], q_indptr[request + 1]
        old_k, old_v, old_positions = cached(kv, table, request)
        all_k = np.concatenate([old_k, k[start:stop]])
        all_v = np.concatenate([old_v, v[start:stop]])
        positions = np.concatenate([old_positions, prefix + np.arange(stop - start)])
        for row in range(start, stop):
            visible = in_window(positions, int(prefix + row - start), sliding_window)
            out[row] = attend(q[row], all_k, all_v, visible, scale, logit_cap, sinks)
    return out
