"""The operations of a forward pass, with the vendor's numerics where the project relies on them."""

import functools
import os
import time
from types import SimpleNamespace

import numpy as np
import torch

from hma_kernels import bfp8_round

from .tensors import (
    ROW_MAJOR_LAYOUT,
    TILE_LAYOUT,
    Tensor,
    Trace,
    bfloat8_b,
    bfloat16,
    enqueue,
    float32,
    int32,
    on_each_chip,
    uint32,
    written,
)

MathFidelity = SimpleNamespace(HiFi2="HiFi2", HiFi3="HiFi3")
UnaryOpType = SimpleNamespace(SILU="silu")


def init_device_compute_kernel_config(arch, **options):
    assert options["fp32_dest_acc_en"] and not options["math_approx_mode"]
    return options


def SDPAProgramConfig(**options):
    return SimpleNamespace(**options)


def _out(value, *sources, dtype=bfloat16):
    for source in sources:
        assert source.device is not None, "an operand is on the host"
    value = value.float() if dtype == float32 else value.bfloat16()
    if dtype == bfloat8_b:
        value = bfp8_round(value.contiguous(), rounding="device")
    return Tensor([value.float()], dtype, TILE_LAYOUT, sources[0].device)


@on_each_chip
def embedding(ids, table, *, layout, dtype):
    assert ids.dtype == uint32 and ids.layout == table.layout == ROW_MAJOR_LAYOUT
    rows = table.value.reshape(-1, table.shape[-1])
    return _out(rows[ids.value.long()], ids, table)


@on_each_chip
def reshape(x, shape):
    return Tensor([x.value.reshape(shape)], x.dtype, x.layout, x.device)


@on_each_chip
def slice(x, begin, end):
    unit = 32 if x.layout == TILE_LAYOUT else 1
    assert all(a % unit == b % unit == 0 for a, b in zip(begin[-2:], end[-2:], strict=True))
    # A card reads lines of 64 bytes from where a row is cut.
    assert x.layout == TILE_LAYOUT or begin[-1] % 16 == 0, begin
    part = x.value
    for dim, (first, last) in enumerate(zip(begin, end, strict=True)):
        assert 0 <= first < last <= x.shape[dim], (begin, end, x.shape)
        part = part.narrow(dim, first, last - first)
    return Tensor([part.clone()], x.dtype, x.layout, x.device)


def concat(tensors, *, dim, memory_config=None):
    assert len(tensors) > 1 and len({(x.dtype, x.layout) for x in tensors}) == 1
    return _joined(*tensors, dim=dim)


@on_each_chip
def _joined(*tensors, dim):
    first = tensors[0]
    values = torch.cat([x.value for x in tensors], dim)
    return Tensor([values], first.dtype, first.layout, first.device)


@on_each_chip
def to_layout(x, layout):
    assert x.layout == TILE_LAYOUT and layout == ROW_MAJOR_LAYOUT
    return Tensor([x.value.clone()], x.dtype, layout, x.device)


@on_each_chip
def rms_norm(x, *, epsilon, weight, memory_config=None, compute_kernel_config):
    assert compute_kernel_config["math_fidelity"] == MathFidelity.HiFi3
    assert weight.layout == TILE_LAYOUT and weight.shape == (1, 1, 1, x.shape[-1])
    wide = x.value.double()
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return _out(wide * scale * weight.value.reshape(-1).double(), x, weight)


@on_each_chip
def linear(x, weight, *, bias=None, dtype, memory_config=None, compute_kernel_config):
    assert weight.layout == TILE_LAYOUT and x.layout == TILE_LAYOUT
    y = x.value.double() @ weight.value.double()
    return _out(y if bias is None else y + bias.value.double(), x, weight, dtype=dtype)


@on_each_chip
def _sum(a, b):
    return _out(a.value + b.value, a, b)


def add(a, b, *, memory_config=None, output_tensor=None):
    return written(output_tensor, _sum, a, b)


@on_each_chip
def mul(a, b, *, input_tensor_a_activations=(), dtype=None, memory_config=None):
    assert list(input_tensor_a_activations) in ([], [UnaryOpType.SILU]) and a.dtype == b.dtype
    wide = a.value.double()
    if input_tensor_a_activations:
        wide = torch.nn.functional.silu(wide)
    return _out(wide * b.value.double(), a, b, dtype=dtype or a.dtype)


def _compared(operation):
    @on_each_chip
    def compare(a, b, *, dtype):
        assert a.dtype == b.dtype and dtype == bfloat16
        return _out(operation(a.value, b.value).float(), a, b)

    return compare


lt, ge = _compared(torch.lt), _compared(torch.ge)


@on_each_chip
def topk(x, k, *, dim, largest, sorted, stable):
    assert dim == -1 and largest and sorted and stable and x.dtype == float32
    values, places = x.value.sort(dim=-1, descending=True, stable=True)
    return (
        _out(values[..., :k], x, dtype=float32),
        Tensor([places[..., :k].int()], uint32, TILE_LAYOUT, x.device),
    )


@on_each_chip
def scatter(x, dim, index, source):
    assert x.dtype == source.dtype == bfloat16, "ttnn refuses float32 in tiles"
    return _out(x.value.scatter(dim, index.value.long(), source.value), x, index, source)


@on_each_chip
def where(condition, value, other):
    assert condition.dtype == value.dtype, "ttnn refuses mixed types"
    chosen = torch.where(condition.value != 0, value.value, torch.tensor(other))
    return _out(chosen, condition, value, dtype=value.dtype)


@on_each_chip
def softmax(x, *, dim, compute_kernel_config, numeric_stable):
    assert compute_kernel_config["math_fidelity"] == MathFidelity.HiFi3 and numeric_stable
    return _out(x.value.double().softmax(dim), x, dtype=x.dtype)


def all_reduce(x):
    assert x.device.chips > 1 and x.dtype == bfloat16

    def over_all():
        total = functools.reduce(lambda a, b: (a + b).bfloat16().float(), x.values)
        return Tensor([total] * len(x.values), x.dtype, x.layout, x.device)

    return enqueue(over_all)


@on_each_chip
def typecast(x, dtype, *, memory_config=None):
    if dtype != bfloat8_b:
        assert {dtype, x.dtype} == {float32, bfloat16}
        return _out(x.value, x, dtype=dtype)
    assert x.dtype == bfloat16
    rounded = bfp8_round(x.value.bfloat16(), rounding="device").float()
    return Tensor([rounded], dtype, x.layout, x.device)


@on_each_chip
def _create_qkv_heads(qkv, *, num_heads, num_kv_heads, transpose_k_heads, memory_config=None):
    assert not transpose_k_heads
    heads = qkv.value[0, 0].unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(0, 1)[None]
    return tuple(
        _out(part, qkv) for part in heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    )


@on_each_chip
def _rotary_embedding_hf(x, cos, sin, *, is_decode_mode, memory_config=None, compute_kernel_config):
    assert compute_kernel_config["math_fidelity"] == MathFidelity.HiFi3
    assert not is_decode_mode and (x.shape[-1] == 32 or x.shape[-1] % 64 == 0)
    assert tuple(cos.shape) == (1, 1, *tuple(x.shape)[2:]), (cos.shape, x.shape)
    first, second = x.value.double().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return _out(x.value.double() * cos.value + turned * sin.value, x, cos, sin)


@on_each_chip
def _paged_fill_cache(cache, new, table, *, batch_idx):
    assert cache.dtype == new.dtype == bfloat8_b and table.dtype == int32 and batch_idx == 0
    pages = table.value[0].long()
    rows = new.value[0].unflatten(1, (-1, 32)).transpose(0, 1)
    assert len(pages) == len(rows)
    if Trace.capturing is None:  # a call that is captured does nothing until it is replayed
        cache.value[pages] = rows


@on_each_chip
def _nlp_concat_heads(x, *, memory_config=None):
    return _out(x.value.transpose(1, 2).flatten(2)[:, None], x)


@on_each_chip
def _chunked_attention(
    q,
    keys,
    values,
    table,
    *,
    chunk_start_idx_tensor,
    scale,
    program_config,
    memory_config=None,
    compute_kernel_config,
):
    assert compute_kernel_config["math_fidelity"] == MathFidelity.HiFi3
    assert chunk_start_idx_tensor.shape == (1,) and q.shape[0] == table.shape[0] == 1
    start, length = int(chunk_start_idx_tensor.value), q.shape[2]
    size = program_config.q_chunk_size
    assert start % size == length % size == 0 and size == program_config.k_chunk_size
    assert scale == np.float32(scale), "ttnn refuses it as incompatible arguments"
    assert q.dtype == bfloat16 and keys.dtype == values.dtype == bfloat8_b
    assert table.shape[1] % 8 == 0 and table.shape[1] * 32 >= start + length
    time.sleep(float(os.environ.get("HMA_STAND_IN_LAYER_S", "0")))
    pages = table.value[0, : (start + length) // 32].long()
    k, v = (c.value[pages].transpose(0, 1).flatten(1, 2).double() for c in (keys, values))
    group = q.shape[1] // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q.value[0].double() @ k.transpose(1, 2) * scale
    seen = torch.arange(start + length)[None] <= start + torch.arange(length)[:, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return _out((weights @ v)[None], q, keys)


experimental = SimpleNamespace(
    nlp_create_qkv_heads=_create_qkv_heads,
    rotary_embedding_hf=_rotary_embedding_hf,
    paged_fill_cache=_paged_fill_cache,
    nlp_concat_heads=_nlp_concat_heads,
)
transformer = SimpleNamespace(chunked_scaled_dot_product_attention=_chunked_attention)
