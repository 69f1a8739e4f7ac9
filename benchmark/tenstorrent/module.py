"""The module that the runtime imports as ttnn while it is recorded."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmark.tenstorrent.operations import OPERATIONS
from benchmark.tenstorrent.recorder import Recorder
from benchmark.tenstorrent.tensors import (
    BLOCK_TILE_BYTES,
    DRAM,
    ELEMENT_BYTES,
    L1,
    ROW_MAJOR_LAYOUT,
    TILE_LAYOUT,
    Memory,
    Shape,
    Tensor,
    kept,
)

HERE = "benchmark/tenstorrent/operations.py"
GRID = SimpleNamespace(
    x=13, y=10
)  # cores of a described Blackhole card; an option of programs, no rate
DRAM_BANKS = 8


class UnknownOperation(AttributeError):
    """An operation that is in no table yet."""


@dataclass
class Device:
    """A mesh of chips; every chip makes the same calls."""

    chips: int
    recorder: Recorder

    def get_num_devices(self) -> int:
        return self.chips

    def arch(self) -> str:
        return "Arch.BLACKHOLE"

    def num_program_cache_entries(self) -> int:
        return len(self.recorder.programs)

    def compute_with_storage_grid_size(self) -> SimpleNamespace:
        return GRID


class Options(SimpleNamespace):
    """A config object of ttnn: what it was given."""


@dataclass
class Event:
    queue: int


class Namespace(ModuleType):
    """ttnn, or a part of it: what is not there is an operation that nobody has described."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        raise UnknownOperation(
            f"{full} is not known to the cost model: describe an operation in {HERE}, what the "
            "host does in module.py"
        )


def _module(recorder: Recorder) -> ModuleType:
    ttnn = Namespace("ttnn")
    ttnn.__spec__ = ModuleSpec("ttnn", None)
    ttnn.__path__ = []
    for name in OPERATIONS:
        *parents, last = name.split(".")
        place = ttnn
        for parent in parents:
            if parent not in vars(place):
                setattr(place, parent, Namespace(f"{place.__name__}.{parent}"))
            place = vars(place)[parent]
        setattr(place, last, _bound(recorder, name))
    for name, value in (_constants() | _host_side(recorder)).items():
        setattr(ttnn, name, value)
    return ttnn


def _bound(recorder: Recorder, name: str) -> Callable[..., Any]:
    return lambda *args, **options: recorder.operate(name, *args, **options)


def _constants() -> dict[str, Any]:
    fidelities = ("LoFi", "HiFi2", "HiFi3", "HiFi4")
    return {
        **{name: name for name in (*ELEMENT_BYTES, *BLOCK_TILE_BYTES)},
        **{"TILE_LAYOUT": TILE_LAYOUT, "ROW_MAJOR_LAYOUT": ROW_MAJOR_LAYOUT},
        **{"DRAM_MEMORY_CONFIG": DRAM, "L1_MEMORY_CONFIG": L1},
        "Shape": Shape,
        "SDPAProgramConfig": Options,
        "BufferType": SimpleNamespace(DRAM="DRAM"),
        "UnaryOpType": SimpleNamespace(SILU="SILU"),
        "MathFidelity": SimpleNamespace(**{name: name for name in fidelities}),
        "FabricConfig": SimpleNamespace(DISABLED="off", FABRIC_1D="line"),
        "MeshShape": lambda rows, columns: (rows, columns),
        "MeshCoordinate": lambda _row, column: column,
        "init_device_compute_kernel_config": lambda _arch, **options: Options(**options),
    }


def _host_side(recorder: Recorder) -> dict[str, Any]:
    """Everything of ttnn that is no operation of the card."""
    note = recorder.note

    def placed(tensor: Tensor, device: Any, memory: Any) -> Tensor:
        return _elsewhere(tensor, device, memory or DRAM)

    def open_mesh_device(shape: Any, *_: Any, **__: Any) -> Device:
        rows, columns = shape
        return Device(rows * columns, recorder)

    def memory_view(_device: Any, _kind: Any) -> Any:
        whole = {"total_bytes_per_bank": 1 << 40, "total_bytes_free_per_bank": 1 << 40}
        return SimpleNamespace(num_banks=DRAM_BANKS, **whole)

    def from_torch(
        value: torch.Tensor,
        dtype: Any = None,
        *,
        layout: str = ROW_MAJOR_LAYOUT,
        device: Any = None,
        memory_config: Any = None,
        mesh_mapper: Any = None,
        cq_id: int = 0,
        **_: Any,
    ) -> Tensor:
        kind = dtype or str(value.dtype).removeprefix("torch.")
        shape = list(value.shape)
        if mesh_mapper is not None and mesh_mapper.dim is not None:
            shape[mesh_mapper.dim] //= mesh_mapper.device.chips
        host = Tensor(Shape(shape), kind, layout, None, integers=kept(value, kind))
        if device is None:
            return host
        return to_device(host, device, memory_config, cq_id=cq_id, name="from_torch")

    def to_device(
        host: Tensor, device: Any, memory_config: Any = None, *, cq_id: Any = 0, name: Any = None
    ) -> Tensor:
        tensor = placed(host, device, memory_config)
        looks = {"operands": (host.looks,), "results": (tensor.looks,)}
        note(name or "to_device", "upload", up=host.bytes, queue=cq_id or 0, **looks)
        return tensor

    def to_card(host: Tensor, target: Tensor, cq_id: Any = 0, **_: Any) -> None:
        if host.shape != target.shape or host.dtype != target.dtype:
            raise RuntimeError(f"copy_host_to_device_tensor: {host.looks} to {target.looks}")
        target.integers = host.integers
        looks = {"operands": (host.looks,), "results": (target.looks,)}
        note("copy_host_to_device_tensor", "upload", up=host.bytes, queue=cq_id or 0, **looks)

    def from_device(tensor: Tensor, *_: Any, cq_id: Any = 0, **__: Any) -> Tensor:
        note("from_device", "download", down=tensor.bytes, operands=(tensor.looks,))
        return _elsewhere(tensor, None, None)

    def to_torch(tensor: Tensor, *_: Any, mesh_composer: Any = None, **__: Any) -> torch.Tensor:
        shape = list(tensor.shape)
        if tensor.memory is not None:
            note("to_torch", "download", down=tensor.bytes, operands=(tensor.looks,))
        if mesh_composer is not None:
            shape[mesh_composer.dim] *= mesh_composer.device.chips
        return torch.zeros(1, dtype=torch.bfloat16).expand(shape)

    def to_host(source: Tensor, target: Tensor, blocking: Any = True, cq_id: Any = 0) -> None:
        if source.shape != target.shape or source.dtype != target.dtype:
            raise RuntimeError(f"copy_device_to_host_tensor: {source.looks} to {target.looks}")
        looks = {"operands": (source.looks,), "results": (target.looks,)}
        name = "copy_device_to_host_tensor"
        note(name, "download", down=source.bytes, queue=cq_id or 0, **looks)

    def on_host(shape: Any, dtype: str, layout: str, _device: Any, *_: Any) -> Tensor:
        return Tensor(Shape(shape), dtype, layout, None)

    def zeros(
        shape: Any,
        *_: Any,
        dtype: str = "bfloat16",
        layout: str = TILE_LAYOUT,
        device: Any = None,
        memory_config: Any = None,
    ) -> Tensor:
        tensor = Tensor(Shape(shape), dtype, layout, memory_config or DRAM, device)
        note("zeros", "other", writes=tensor.dram, results=(tensor.looks,), programs=1)
        return tensor

    def record_event(_device: Any, queue: int = 0, *_: Any, **__: Any) -> Event:
        note("record_event", "event", queue=queue)
        return Event(queue)

    def event_synchronize(_event: Event) -> None:
        note("event_synchronize", "wait")

    def wait_for_event(queue: int, _event: Event) -> None:
        note("wait_for_event", "event", queue=queue)

    def execute(_device: Any, number: int, *_: Any, blocking: bool = True, **__: Any) -> None:
        recorder.replay(number)
        if blocking:
            note("execute_trace", "wait", host=0)

    def nothing(*_: Any, **__: Any) -> None:
        """What the host does by itself."""

    return {
        "open_mesh_device": open_mesh_device,
        "open_device": lambda *_, **__: Device(1, recorder),
        "close_mesh_device": nothing,
        "set_fabric_config": nothing,
        "get_memory_view": memory_view,
        "ReplicateTensorToMesh": lambda device: Options(device=device, dim=None),
        "ShardTensorToMesh": lambda device, dim: Options(device=device, dim=dim),
        "ConcatMeshToTensor": lambda device, dim: Options(device=device, dim=dim),
        "get_device_tensors": lambda tensor: [tensor],
        "from_torch": from_torch,
        "to_device": to_device,
        "copy_host_to_device_tensor": to_card,
        "from_device": from_device,
        "to_torch": to_torch,
        "copy_device_to_host_tensor": to_host,
        "allocate_tensor_on_host": on_host,
        "zeros": zeros,
        "record_event": record_event,
        "wait_for_event": wait_for_event,
        "event_synchronize": event_synchronize,
        "begin_trace_capture": lambda _device, *_, **__: recorder.begin_trace(),
        "end_trace_capture": lambda _device, number, *_, **__: recorder.end_trace(number),
        "execute_trace": execute,
        "release_trace": lambda _device, number: recorder.traces.pop(number, None),
    }


def _elsewhere(tensor: Tensor, device: Any, memory: Memory | None) -> Tensor:
    """The same values somewhere else: a tensor of its own."""
    return Tensor(tensor.shape, tensor.dtype, tensor.layout, memory, device, tensor.integers)


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Meanwhile `import ttnn` gives a recorder's module."""
    recorder = Recorder()
    others = [name for name in sys.modules if name.partition(".")[0] == "ttnn"]
    with mock.patch.dict(sys.modules):
        for name in others:
            del sys.modules[name]
        sys.modules["ttnn"] = _module(recorder)
        yield recorder
