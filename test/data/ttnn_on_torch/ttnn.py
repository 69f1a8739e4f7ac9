"""A stand-in for ttnn where there is no card: the operations that the runtime uses, on torch.

It has the vendor's numerics where the project relies on them: BF16 between operations, both BFP8
packers, attention over the packed pages. It refuses what ttnn refuses of the runtime's calls. A
copy to the host happens when its event is waited for, and fails if the source was freed before.
"""

import enum
import os
import time
import weakref
from types import SimpleNamespace

import numpy as np
import torch

from hma_kernels import bfp8_pack, bfp8_round

bfloat8_b, bfloat16, uint32, int32 = "bfloat8_b", "bfloat16", "uint32", "int32"
TILE_LAYOUT, ROW_MAJOR_LAYOUT, DRAM_MEMORY_CONFIG = "tile", "row major", "dram"
BufferType = SimpleNamespace(DRAM="dram")
MathFidelity = SimpleNamespace(HiFi2="HiFi2")
UnaryOpType = SimpleNamespace(SILU="silu")


def MeshCoordinate(*at):
    return at


class Arch(enum.Enum):
    BLACKHOLE = 1


class Shape(tuple):
    pass


class Tensor:
    def __init__(self, value, dtype, layout, device):
        self.value, self.dtype, self.layout, self.device = value, dtype, layout, device

    @property
    def shape(self):
        return Shape(self.value.shape)

    def host_buffer(self):
        assert self.device is None and self.layout == TILE_LAYOUT
        if self.dtype == bfloat16:
            rows = self.value.bfloat16().unflatten(-2, (-1, 2, 16)).unflatten(-1, (-1, 2, 16))
            faces = rows.movedim((-6, -3, -5, -2, -4, -1), (-6, -5, -4, -3, -2, -1))
            return SimpleNamespace(get_shard=lambda _: faces.contiguous())
        if not hasattr(self, "bytes"):
            self.bytes = np.zeros(self.value.numel() // 1024 * 1088, np.uint8)
        return SimpleNamespace(get_shard=lambda _: torch.from_numpy(self.bytes))


class Device:
    def arch(self):
        return Arch.BLACKHOLE

    def compute_with_storage_grid_size(self):
        return (13, 10)


class Event:
    def __init__(self, copies):
        self.copies = copies


_pending = []


def open_device(*, device_id, num_command_queues):
    assert device_id == 0 and num_command_queues == 2
    return Device()


def close_device(device):
    pass


def get_memory_view(device, kind):
    return SimpleNamespace(
        num_banks=8, total_bytes_per_bank=1 << 32, total_bytes_free_per_bank=1 << 32
    )


def init_device_compute_kernel_config(arch, **options):
    assert options["fp32_dest_acc_en"] and not options["math_approx_mode"]
    return options


def SDPAProgramConfig(**options):
    return SimpleNamespace(**options)


def from_torch(value, *, dtype, layout, device=None):
    if dtype == bfloat8_b:
        rounded = bfp8_round(_padded(value.float()), rounding="host")
        value = rounded[..., : value.shape[-1]]
    elif dtype == bfloat16:
        value = value.bfloat16().float()
    return Tensor(value.clone(), dtype, layout, device)


def to_device(tensor, device, memory_config=None):
    return Tensor(tensor.value, tensor.dtype, tensor.layout, device)


def from_device(tensor):
    return Tensor(tensor.value, tensor.dtype, tensor.layout, None)


def to_torch(tensor):
    return tensor.value.bfloat16()


def zeros(shape, *, dtype, layout, device, memory_config):
    return Tensor(torch.zeros(tuple(shape)), dtype, layout, device)


def dump_tensor(path, tensor):
    torch.save((tensor.value, tensor.dtype, tensor.layout), path)


def load_tensor(path, *, device):
    return Tensor(*torch.load(path), device)


def _padded(value):
    pad = -value.shape[-1] % 32
    return torch.nn.functional.pad(value, (0, pad)).contiguous()


def _out(value, *sources):
    for source in sources:
        assert source.device is not None, "an operand is on the host"
    return Tensor(value.bfloat16().float(), bfloat16, TILE_LAYOUT, sources[0].device)


def embedding(ids, table, *, layout, dtype):
    assert ids.dtype == uint32 and table.layout == ROW_MAJOR_LAYOUT
    return _out(table.value[ids.value.long()], ids, table)


def reshape(x, shape):
    return _out(x.value.reshape(shape), x)


def rms_norm(x, *, epsilon, weight):
    assert weight.layout == ROW_MAJOR_LAYOUT and weight.shape[-1] == 32
    wide = x.value.double()
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return _out(wide * scale * weight.value.reshape(-1).double(), x, weight)


def linear(x, weight, *, bias=None, dtype, compute_kernel_config):
    assert dtype == bfloat16 and weight.layout == TILE_LAYOUT
    y = x.value.double() @ weight.value.double()
    return _out(y if bias is None else y + bias.value.double(), x, weight)


def add(a, b):
    return _out(a.value + b.value, a, b)


def mul(a, b, *, input_tensor_a_activations):
    assert input_tensor_a_activations == [UnaryOpType.SILU]
    return _out(torch.nn.functional.silu(a.value.double()) * b.value.double(), a, b)


def typecast(x, dtype):
    assert dtype == bfloat8_b and x.dtype == bfloat16
    return Tensor(
        bfp8_round(x.value.bfloat16(), rounding="device").float(), dtype, x.layout, x.device
    )


def _create_qkv_heads(qkv, *, num_heads, num_kv_heads, transpose_k_heads):
    assert not transpose_k_heads
    heads = qkv.value[0, 0].unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(0, 1)[None]
    return tuple(
        _out(part, qkv) for part in heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    )


def _rotary_embedding_hf(x, cos, sin, *, is_decode_mode):
    assert not is_decode_mode and (x.shape[-1] == 32 or x.shape[-1] % 64 == 0)
    assert cos.shape == (1, 1, *x.shape[2:]), (cos.shape, x.shape)
    first, second = x.value.double().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return _out(x.value.double() * cos.value + turned * sin.value, x, cos, sin)


def _paged_fill_cache(cache, new, table, *, batch_idx):
    assert cache.dtype == new.dtype == bfloat8_b and table.dtype == int32 and batch_idx == 0
    pages = table.value[0].long()
    rows = new.value[0].unflatten(1, (-1, 32)).transpose(0, 1)
    assert len(pages) == len(rows)
    cache.value[pages] = rows


def _nlp_concat_heads(x):
    return _out(x.value.transpose(1, 2).flatten(2)[:, None], x)


def _chunked_attention(
    q, keys, values, table, *, chunk_start_idx_tensor, scale, program_config, compute_kernel_config
):
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


def allocate_tensor_on_host(shape, dtype, layout, device):
    return Tensor(torch.zeros(tuple(shape)), dtype, layout, None)


def copy_device_to_host_tensor(source, target, *, blocking, cq_id):
    assert not blocking and cq_id == 1 and source.shape == target.shape
    _pending.append((weakref.ref(source), target))


def record_event(device, queue):
    if queue == 0:
        return Event([])
    event = Event(list(_pending))
    _pending.clear()
    return event


def wait_for_event(queue, event):
    assert queue == 1


def event_synchronize(event):
    for source, target in event.copies:
        alive = source()
        assert alive is not None, "a tensor was freed before it was copied"
        target.host_buffer().get_shard(None).copy_(
            bfp8_pack(alive.value, rounding="device").flatten()
        )
    event.copies.clear()
