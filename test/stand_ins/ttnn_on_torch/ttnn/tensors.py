"""Tensors, each chip's part of them, and their ways to and from torch."""

import functools
from types import SimpleNamespace

import numpy as np
import torch

from hma_kernels import bfp8_round

bfloat8_b, bfloat16, float32 = "bfloat8_b", "bfloat16", "float32"
uint32, int32 = "uint32", "int32"
TILE_LAYOUT, ROW_MAJOR_LAYOUT = "tile", "row major"
DRAM_MEMORY_CONFIG, L1_MEMORY_CONFIG = "dram", "l1"


class Shape(tuple):
    def __getitem__(self, index):
        assert isinstance(index, int), "ttnn's shapes have no slices"
        return super().__getitem__(index)


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

        def over_all():
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

        return enqueue(over_all)

    return on_all


def enqueue(compute):
    """Compute now; while a trace is captured, with each of its replays, and nothing until then."""
    results = compute()
    Clock.enqueued += 1
    if Trace.capturing is not None:
        Trace.capturing.steps.append((compute, results))
        for one in results if isinstance(results, tuple) else (results,):
            if one is not None and one.dtype in (bfloat16, bfloat8_b):
                one.values = [torch.full_like(value, float("nan")) for value in one.values]
    return results


def written(target, operation, *args):
    """The operation's result, in `target`'s place if there is one."""
    if target is None:
        return operation(*args)

    def into():
        captured = Trace.capturing is not None
        result = _quietly(operation, *args)
        assert target.shape == result.shape and target.dtype == result.dtype
        if not captured:
            target.values = result.values

    enqueue(into)
    return target


def _quietly(operation, *args):
    """As a part of another step."""
    capturing, Trace.capturing = Trace.capturing, None
    try:
        result = operation(*args)
    finally:
        Trace.capturing = capturing
    Clock.enqueued -= 1
    return result


class Trace:
    """Steps of a captured trace with the tensors that they write to."""

    capturing = None

    def __init__(self):
        self.steps = []

    def replay(self):
        for compute, results in self.steps:
            again = compute()
            olds, news = (x if isinstance(x, tuple) else (x,) for x in (results, again))
            for old, new in zip(olds, news, strict=True):
                if old is not None:
                    old.values = new.values
        Clock.enqueued += 1


class Clock:
    """Operations that were enqueued, and how many of them the host knows to be over."""

    enqueued = over = 0


def _read(tensor):
    assert Trace.capturing is None
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
    assert device is None or Trace.capturing is None, "a trace has no values of the host"

    def stored(part):
        if dtype == bfloat8_b:
            return bfp8_round(_padded(part.float()), rounding="host")[..., : part.shape[-1]].clone()
        return part.bfloat16().float() if dtype == bfloat16 else part.clone()

    return Tensor([stored(part) for part in mesh_mapper(value)], dtype, layout, device)


def copy_host_to_device_tensor(source, target, *, cq_id):
    assert cq_id == 0 and Trace.capturing is None
    assert source.device is None and target.device is not None
    for name in ("shape", "dtype", "layout"):
        assert getattr(source, name) == getattr(target, name), name
    target.values = source.values


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
