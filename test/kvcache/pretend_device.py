"""Tensors that claim to be on a device, and a note of each operation for which the host would wait.

The values are on the CPU. What an operation makes of a tensor on the device is on the device. It is
called "meta": torch asks a driver about any other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten

# Those whose result has a size, or is a Python number, that depends on values.
WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim),
    *(aten.unique_consecutive, aten.equal, aten.bincount, aten.is_nonzero),
}


class OnDevice(torch.Tensor):
    """values: what it holds, on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), dtype=values.dtype, device=DEVICE
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of a PretendDevice")

    def tolist(self) -> Any:
        raise AssertionError("the host waits for a tensor's values")

    numpy = tolist


class PretendDevice(TorchDispatchMode):
    """waits: the operations so far for which the host would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        on_device = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)))
        to = kwargs.get("device")
        stays = on_device if to is None else torch.device(to) == DEVICE
        if to is not None:
            kwargs["device"] = "cpu"
        if on_device and self._waits(func, args, kwargs, stays):
            self.waits.append(str(func))
        inner = tree_map(lambda x: x.values if isinstance(x, OnDevice) else x, (args, kwargs))
        result = func(*inner[0], **inner[1])
        if func._schema.name.endswith("_") and args:  # in place
            return args[0]
        if not stays:
            return result
        return tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, result)

    @staticmethod
    def _waits(func: Any, args: Any, kwargs: Any, stays: bool) -> bool:
        packet = func.overloadpacket
        if packet in (aten.index, aten.index_put, aten.index_put_):
            return any(x is not None and x.dtype == torch.bool for x in args[1])
        if packet is aten.copy_:  # to the host, or from pageable memory
            here, there = (isinstance(x, OnDevice) for x in args[:2])
            return here != there and not (kwargs.get("non_blocking") or args[2:] == (True,))
        if packet is aten._to_copy:
            return not stays and not kwargs.get("non_blocking")
        if packet is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        return packet in WAITING


@contextmanager
def pretend_device(patch: Callable[..., None]) -> Iterator[PretendDevice]:
    """patch: monkeypatch.setattr. There is no pinned memory without a GPU."""
    patch(torch.Tensor, "pin_memory", lambda self: self)
    with PretendDevice() as device:
        yield device
