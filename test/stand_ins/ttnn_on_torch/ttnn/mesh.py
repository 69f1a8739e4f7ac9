"""A mesh of chips, their memory, and copies to the host beside the computation."""

import enum
import weakref
from types import SimpleNamespace

import torch

from hma_kernels import bfp8_pack

from .tensors import Clock, Tensor, Trace

BufferType = SimpleNamespace(DRAM="dram")
FabricConfig = SimpleNamespace(DISABLED="off", FABRIC_1D="line")


def MeshCoordinate(row, column):
    assert row == 0
    return column


def MeshShape(rows, columns):
    assert rows == 1
    return columns


class Arch(enum.Enum):
    BLACKHOLE = 1


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
        return SimpleNamespace(x=13, y=10)


class Event:
    def __init__(self, copies, enqueued=0):
        self.copies, self.enqueued = copies, enqueued


_fabric = [FabricConfig.DISABLED]
_pending = []


def set_fabric_config(config):
    _fabric[0] = config


def open_mesh_device(chips, *, num_command_queues, trace_region_size):
    assert num_command_queues == 2 and trace_region_size > 0
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


def allocate_tensor_on_host(shape, dtype, layout, device):
    return Tensor([torch.zeros(tuple(shape))] * device.chips, dtype, layout, None)


def copy_device_to_host_tensor(source, target, *, blocking, cq_id):
    assert not blocking and cq_id == 1 and source.shape == target.shape
    _pending.append((weakref.ref(source), target))


def begin_trace_capture(device, *, cq_id):
    assert cq_id == 0 and Trace.capturing is None
    Trace.capturing = Trace()
    return Trace.capturing


def end_trace_capture(device, trace, *, cq_id):
    assert cq_id == 0 and Trace.capturing is trace
    Trace.capturing = None


def execute_trace(device, trace, *, cq_id, blocking):
    assert cq_id == 0 and not blocking and Trace.capturing is None
    trace.replay()


def release_trace(device, trace):
    trace.steps.clear()


def record_event(device, queue):
    assert Trace.capturing is None, "a trace has no events"
    if queue == 0:
        return Event([], Clock.enqueued)
    event = Event(list(_pending))
    _pending.clear()
    return event


def wait_for_event(queue, event):
    assert queue == 1


def event_synchronize(event):
    Clock.over = max(Clock.over, event.enqueued)
    for source, target in event.copies:
        alive = source()
        assert alive is not None, "a tensor was freed before it was copied"
        for chip, value in enumerate(alive.values):
            packed = bfp8_pack(value, rounding="device").flatten()
            target.host_buffer().get_shard(chip).copy_(packed)
    event.copies.clear()
