"""Tensors, each chip's part of them, and their ways to and from torch."""

import functools
from types import SimpleNamespace

import numpy as np
import torch

from hma_kernels import bfp8_round

bfloat8_b, bfloat16, float32 = "bfloat8_b", "bfloat16", "float32"
uint32, int32 = "uint32", "int32"
TILE_LAYOUT, ROW_MAJOR_LAYOUT, DRAM_MEMORY_CONFIG = "tile", "row major", "dram"


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
        Clock.enqueued += 1
        if isinstance(results[0], tuple):
            return tuple(_together(parts) for parts in zip(*results, strict=True))
        return _together(results)

    return on_all


class Clock:
    """Operations that were enqueued, and how many of them the host knows to be over."""

    enqueued = over = 0


def _read(tensor):
    on_card = tensor.device is not None
    assert not on_card or Clock.over == Clock.enqueued, (
        "the read waits for the card with the interpreter's lock held"
    )


def _part(x, chip):
    return x.on_chip(chip) if isinstance(x, Tensor) else x


def _together(parts):
    if parts[0] is None:
        return None
    first = parts[0]
    return Tensor([part.value for part in parts], first.dtype, first.layout, first.device)


def from_torch(value, *, dtype, layout, mesh_mapper, device=None):
    def stored(part):
        if dtype == bfloat8_b:
            return bfp8_round(_padded(part.float()), rounding="host")[..., : part.shape[-1]].clone()
        return part.bfloat16().float() if dtype == bfloat16 else part.clone()

    return Tensor([stored(part) for part in mesh_mapper(value)], dtype, layout, device)


def to_device(tensor, device, memory_config=None):
    return Tensor(tensor.values, tensor.dtype, tensor.layout, device)


def from_device(tensor):
    _read(tensor)
    return Tensor(tensor.values, tensor.dtype, tensor.layout, None)


def to_torch(tensor, *, mesh_composer):
    _read(tensor)
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
