"""Tensors of a recorded ttnn: shape, type, layout and memory, no values.

Integers that came from the host are kept, because attention's work hangs on where a chunk starts.
"""

import itertools
import math
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hma_kernels.layout import TILE, TILE_BYTES

TILE_LAYOUT, ROW_MAJOR_LAYOUT = "TILE", "ROW_MAJOR"
ELEMENT_BYTES = {"bfloat16": 2, "float32": 4, "uint32": 4, "int32": 4, "uint16": 2, "uint8": 1}
# A tile of 32 x 32 with a shared exponent for each 16 values.
BLOCK_TILE_BYTES = {"bfloat8_b": TILE_BYTES}
KEPT_INTEGERS = 1 << 18  # of page tables and token ids: a server has few of either

_numbers = itertools.count()


class Shape(tuple[int, ...]):
    """ttnn's own."""


@dataclass(frozen=True)
class Memory:
    """What ttnn calls a memory config: DRAM, or the cores' own L1, which costs no DRAM traffic."""

    buffer_type: str

    @property
    def in_dram(self) -> bool:
        return self.buffer_type == "DRAM"


DRAM, L1 = Memory("DRAM"), Memory("L1")


@dataclass(frozen=True)
class Looks:
    """Of an operand or a result, as it is written down."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    memory: str


@dataclass
class Tensor:
    """One chip's part. memory: None on the host; integers: its values, where they are kept."""

    shape: Shape
    dtype: str
    layout: str
    memory: Memory | None
    on: Any = None
    integers: torch.Tensor | None = None
    number: int = field(default_factory=lambda: next(_numbers))
    shards: dict[int, torch.Tensor] = field(default_factory=dict)

    def memory_config(self) -> Memory | None:
        return self.memory

    @property
    def padded_shape(self) -> Shape:
        return padded(self.shape, self.layout)

    @cached_property
    def bytes(self) -> int:
        return size(tuple(self.shape), self.dtype, self.layout)

    @property
    def dram(self) -> int:
        """Bytes of it that one pass over it moves to or from DRAM."""
        return self.bytes if self.memory is not None and self.memory.in_dram else 0

    @cached_property
    def looks(self) -> Looks:
        memory = "host" if self.memory is None else self.memory.buffer_type
        return Looks(tuple(self.shape), self.dtype, self.layout, memory)

    def host_buffer(self) -> Any:
        """Zeros that are never written: the system gives them no memory."""
        if self.memory is not None:
            raise RuntimeError("host_buffer of a tensor on the card")

        def shard(chip: int) -> torch.Tensor:
            if chip not in self.shards:
                self.shards[chip] = unwritten(self.bytes)
            return self.shards[chip]

        return SimpleNamespace(get_shard=shard)


def padded(shape: tuple[int, ...], layout: str) -> Shape:
    if layout != TILE_LAYOUT:
        return Shape(shape)
    whole = (1,) * (2 - len(shape)) + tuple(shape)
    return Shape((*whole[:-2], *(-(-each // TILE) * TILE for each in whole[-2:])))


@cache
def size(shape: tuple[int, ...], dtype: str, layout: str) -> int:
    """Bytes, padding to tiles included."""
    elements = math.prod(padded(shape, layout))
    if dtype in BLOCK_TILE_BYTES:
        return elements // TILE**2 * BLOCK_TILE_BYTES[dtype]
    return elements * ELEMENT_BYTES[dtype]


def unwritten(count: int) -> torch.Tensor:
    return torch.from_numpy(np.zeros(count, np.uint8))


def kept(value: torch.Tensor, dtype: str) -> torch.Tensor | None:
    """Integers that operations may hang on."""
    integers = "int" in dtype and value.device.type != "meta" and value.numel() <= KEPT_INTEGERS
    return value.clone() if integers else None
