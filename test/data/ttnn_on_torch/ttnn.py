"""A stand-in for ttnn where there is no card: the operations that the runtime uses, on torch.

It has the vendor's numerics where the project relies on them: BF16 between operations, both BFP8
packers, attention over the packed pages. It refuses what ttnn refuses of the runtime's calls. A
copy to the host happens when its event is waited for, and fails if the source was freed before. On
a mesh each chip computes with its own part of every tensor, and only all_reduce looks at others'.
"""

import enum
import functools
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
MathFidelity = SimpleNamespace(HiFi2="HiFi2", HiFi3="HiFi3")
UnaryOpType = SimpleNamespace(SILU="silu")


FabricConfig = SimpleNamespace(DISABLED="off", FABRIC_1D="line")


def MeshCoordinate(row, column):
    assert row == 0
    return column


def MeshShape(rows, columns):
    assert rows == 1
    return columns


class Arch(enum.Enum):
    BLACKHOLE = 1


class Shape(tuple):
    pass


class Tensor:
    """values: each chip's part."""

    def __init__(self, values, dtype, layout, device):
        self.values, self.dtype, self.layout, self.device = values, dtype, layout, device

    @property
    def value(self):
        assert len(self.values) == 1
        return self.values[0]

    @property
    def shape(self):
        return Shape(self.values[0].shape)

    def on_chip(self, chip):
        return Tensor([self.values[chip]], self.dtype, self.layout, self.device)

    def host_buffer(self):
        assert self.device is None and self.layout == TILE_LAYOUT
        if self.dtype == bfloat16:
            return SimpleNamespace(get_shard=lambda chip: _faces(self.values[chip]))
        if not hasattr(self, "bytes"):
            self.bytes = [np.zeros(v.numel() // 1024 * 1088, np.uint8) for v in self.values]
        return SimpleNamespace(get_shard=lambda chip: torch.from_numpy(self.bytes[chip]))


def _faces(value):
    rows = value.bfloat16().unflatten(-2, (-1, 2, 16)).unflatten(-1, (-1, 2, 16))
    return rows.movedim((-6, -3, -5, -2, -4, -1), (-6, -5, -4, -3, -2, -1)).contiguous()


def _chips(arguments):
    return {len(x.values) for x in arguments if isinstance(x, Tensor)}


def on_each_chip(operation):
    @functools.wraps(operation)
    def on_all(*args, **options):
        (chips,) = _chips([*args, *options.values()])
        results = [
            operation(
                *(_part(x, chip) for x in args),
                **{name: _part(x, chip) for name, x in options.items()},
            )
            for chip in range(chips)
        ]
        if isinstance(results[0], tuple):
            return tuple(_together(parts) for parts in zip(*results, strict=True))
        return _together(results)

    return on_all


def _part(x, chip):
    return x.on_chip(chip) if isinstance(x, Tensor) else x


def _together(parts):
    if parts[0] is None:
        return None
    first = parts[0]
    return Tensor([part.value for part in parts], first.dtype, first.layout, first.device)


class Device:
    def __init__(self, chips):
        self.chips = chips

    def get_num_devices(self):
        return self.chips

    def arch(self):
        return Arch.BLACKHOLE

    def num_program_cache_entries(self):
        return 0

    def compute_with_storage_grid_size(self):
        return (13, 10)


class Event:
    def __init__(self, copies):
        self.copies = copies


_pending = []


_fabric = [FabricConfig.DISABLED]


def set_fabric_config(config):
    _fabric[0] = config


def open_mesh_device(chips, *, num_command_queues):
    assert num_command_queues == 2
    assert chips == 1 or _fabric[0] == FabricConfig.FABRIC_1D, "chips that are not linked"
    if chips > 4:
        raise RuntimeError(f"info:\nRequested mesh shape MeshShape([1, {chips}])")
    return Device(chips)


def close_mesh_device(device):
    pass


def get_device_tensors(tensor):
    return [tensor.on_chip(chip) for chip in range(len(tensor.values))]


def ReplicateTensorToMesh(device):
    return lambda value: [value] * device.chips


def ShardTensorToMesh(device, *, dim):
    def split(value):
        assert device.chips == 1 or value.shape[dim] % (32 * device.chips) == 0, value.shape
        return list(value.chunk(device.chips, dim))

    return split


def ConcatMeshToTensor(device, *, dim):
    return lambda values: torch.cat(values, dim)


def get_memory_view(device, kind):
    return SimpleNamespace(
        num_banks=8, total_bytes_per_bank=1 << 32, total_bytes_free_per_bank=1 << 32
    )


def init_device_compute_kernel_config(arch, **options):
    assert options["fp32_dest_acc_en"] and not options["math_approx_mode"]
    return options


def SDPAProgramConfig(**options):
    return SimpleNamespace(**options)


def from_torch(value, *, dtype, layout, mesh_mapper, device=None):
    def stored(part):
        if dtype == bfloat8_b:
            return bfp8_round(_padded(part.float()), rounding="host")[..., : part.shape[-1]].clone()
        return part.bfloat16().float() if dtype == bfloat16 else part.clone()

    return Tensor([stored(part) for part in mesh_mapper(value)], dtype, layout, device)


def to_device(tensor, device, memory_config=None):
    return Tensor(tensor.values, tensor.dtype, tensor.layout, device)


def from_device(tensor):
    return Tensor(tensor.values, tensor.dtype, tensor.layout, None)


def to_torch(tensor, *, mesh_composer):
    return mesh_composer(tensor.values).bfloat16()


def zeros(shape, *, dtype, layout, device, memory_config):
    values = [torch.zeros(tuple(shape)) for _ in range(device.chips)]
    return Tensor(values, dtype, layout, device)


def dump_tensor(path, tensor):
    torch.save((tensor.values, tensor.dtype, tensor.layout), path)


def load_tensor(path, *, device):
    return Tensor(*torch.load(path), device)


def _padded(value):
    pad = -value.shape[-1] % 32
    return torch.nn.functional.pad(value, (0, pad)).contiguous()


def _out(value, *sources):
    for source in sources:
        assert source.device is not None, "an operand is on the host"
    return Tensor([value.bfloat16().float()], bfloat16, TILE_LAYOUT, sources[0].device)


@on_each_chip
def embedding(ids, table, *, layout, dtype):
    assert ids.dtype == uint32 and table.layout == ROW_MAJOR_LAYOUT
    return _out(table.value[ids.value.long()], ids, table)


@on_each_chip
def reshape(x, shape):
    return _out(x.value.reshape(shape), x)


@on_each_chip
def rms_norm(x, *, epsilon, weight, compute_kernel_config):
    assert compute_kernel_config["math_fidelity"] == MathFidelity.HiFi3
    assert weight.layout == TILE_LAYOUT and weight.shape == (1, 1, 1, x.shape[-1])
    wide = x.value.double()
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return _out(wide * scale * weight.value.reshape(-1).double(), x, weight)


@on_each_chip
def linear(x, weight, *, bias=None, dtype, compute_kernel_config):
    assert dtype == bfloat16 and weight.layout == TILE_LAYOUT
    y = x.value.double() @ weight.value.double()
    return _out(y if bias is None else y + bias.value.double(), x, weight)


@on_each_chip
def add(a, b):
    return _out(a.value + b.value, a, b)


@on_each_chip
def mul(a, b, *, input_tensor_a_activations):
    assert input_tensor_a_activations == [UnaryOpType.SILU]
    return _out(torch.nn.functional.silu(a.value.double()) * b.value.double(), a, b)


def all_reduce(x):
    assert x.device.chips > 1 and x.dtype == bfloat16
    total = functools.reduce(lambda a, b: (a + b).bfloat16().float(), x.values)
    return Tensor([total] * len(x.values), x.dtype, x.layout, x.device)


@on_each_chip
def typecast(x, dtype):
    assert dtype == bfloat8_b and x.dtype == bfloat16
    rounded = bfp8_round(x.value.bfloat16(), rounding="device").float()
    return Tensor([rounded], dtype, x.layout, x.device)


@on_each_chip
def _create_qkv_heads(qkv, *, num_heads, num_kv_heads, transpose_k_heads):
    assert not transpose_k_heads
    heads = qkv.value[0, 0].unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(0, 1)[None]
    return tuple(
        _out(part, qkv) for part in heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    )


@on_each_chip
def _rotary_embedding_hf(x, cos, sin, *, is_decode_mode, compute_kernel_config):
    assert compute_kernel_config["math_fidelity"] == MathFidelity.HiFi3
    assert not is_decode_mode and (x.shape[-1] == 32 or x.shape[-1] % 64 == 0)
    assert cos.shape == (1, 1, *x.shape[2:]), (cos.shape, x.shape)
    first, second = x.value.double().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return _out(x.value.double() * cos.value + turned * sin.value, x, cos, sin)


@on_each_chip
def _paged_fill_cache(cache, new, table, *, batch_idx):
    assert cache.dtype == new.dtype == bfloat8_b and table.dtype == int32 and batch_idx == 0
    pages = table.value[0].long()
    rows = new.value[0].unflatten(1, (-1, 32)).transpose(0, 1)
    assert len(pages) == len(rows)
    cache.value[pages] = rows


@on_each_chip
def _nlp_concat_heads(x):
    return _out(x.value.transpose(1, 2).flatten(2)[:, None], x)


@on_each_chip
def _chunked_attention(
    q, keys, values, table, *, chunk_start_idx_tensor, scale, program_config, compute_kernel_config
):
    assert compute_kernel_config["math_fidelity"] == MathFidelity.HiFi3
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
    return Tensor([torch.zeros(tuple(shape))] * device.chips, dtype, layout, None)


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
        for chip, value in enumerate(alive.values):
            packed = bfp8_pack(value, rounding="device").flatten()
            target.host_buffer().get_shard(chip).copy_(packed)
    event.copies.clear()
