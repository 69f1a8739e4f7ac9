"""Checksums of landed pages: made on prefill, compared on decode before anything reads them.

Mooncake acknowledges a write once its bytes were applied, and checks nothing:
TCP's 16-bit sum, a broken NIC or a late write of an older request are invisible
to it. So each group of pages is followed by XXH3-64 digests, one for each
(layer, K or V) of its pages, and a request becomes readable on decode only when
every page of every layer was compared.
"""

import ctypes
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from hma_kernels.xxh3 import suits, xxh3_64
from sglang_hma.transfer.messages import Group, Resend
from sglang_hma.transfer.page_slices import Area, Pages

MAX_RESENDS = 2

Addresses = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def new_generation() -> int:
    """Tells two lives of one room apart: a late message of the first is no news to the second."""
    return secrets.randbits(63)


class HostMemory:
    """Bytes at raw addresses of this process."""

    device = torch.device("cpu")

    def hashes(self, addresses: Addresses, length: int) -> Hashes:
        """XXH3-64 of `length` bytes at each address, [n] uint64."""
        if suits(length):
            return xxh3_64(addresses, length, self.device)
        blocks = [self.read(address, length) for address in addresses.tolist()]
        return np.array([xxhash.xxh3_64_intdigest(block) for block in blocks], dtype=np.uint64)

    def read(self, address: int, length: int) -> Any:
        return (ctypes.c_char * length).from_address(address)


class DeviceMemory(HostMemory):
    """Bytes at CUDA addresses, hashed where they lie, on a stream of their own."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def hashes(self, addresses: Addresses, length: int) -> Hashes:
        with torch.cuda.stream(self.stream):
            return super().hashes(addresses, length)

    def read(self, address: int, length: int) -> Any:
        class View:
            __cuda_array_interface__ = {
                "shape": (length,),
                "typestr": "|u1",
                "data": (address, True),
                "version": 3,
            }

        return torch.as_tensor(View(), device=self.device).cpu().numpy()


def memory_of(device: str) -> HostMemory:
    return HostMemory() if device == "cpu" else DeviceMemory(device)


def digests(memory: HostMemory, areas: Sequence[Area], pages: Pages) -> list[int]:
    """For each area XXH3-64 over the XXH3-64 of each page's part, 8 little-endian bytes each.

    Hashing page by page lets a device hash them in parallel; areas of one length go in one call.
    """
    at = pages.astype(np.int64)
    found = [0] * len(areas)
    for length in {area.length for area in areas}:
        chosen = [index for index, area in enumerate(areas) if area.length == length]
        where = [areas[index].base + areas[index].stride * at for index in chosen]
        hashes = memory.hashes(np.concatenate(where), length).astype("<u8")
        for index, row in zip(chosen, hashes.reshape(len(chosen), len(at)), strict=True):
            found[index] = int(xxhash.xxh3_64_intdigest(row.tobytes()))
    return found


@dataclass(frozen=True)
class Buffers:
    """One server's registered pages: a base address and a page's bytes for each buffer,
    K of every layer and then V of every layer, as SGLang lists them."""

    addresses: tuple[int, ...]
    page_bytes: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.addresses) // 2

    def of_layer(self, layer: int) -> tuple[int, int]:
        """Indices of a layer's K and V buffer."""
        return layer, self.layers + layer


@dataclass
class Arrival:
    """One request's pages on decode while they arrive."""

    generation: int
    pages: Pages
    ranks: int  # prefill ranks that fill these pages, each an equal part of every page
    verified: dict[tuple[int, int, int], int] = field(default_factory=dict)
    resends: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def complete(self, layers: int) -> bool:
        return sum(self.verified.values()) == layers * len(self.pages) * self.ranks


class CorruptPages(Exception):
    """A range did not match after MAX_RESENDS further tries, or a message made no sense."""


class Verifier:
    """Decode's side: compares groups with the bytes that arrived. Not thread safe:
    one thread receives a server's messages."""

    def __init__(self, buffers: Buffers, memory: HostMemory) -> None:
        self.buffers = buffers
        self.memory = memory
        self.arrivals: dict[int, Arrival] = {}

    def expect(self, room: int, generation: int, pages: Pages, ranks: int) -> None:
        self.arrivals[room] = Arrival(generation, np.array(pages, dtype=np.int32), ranks)

    def forget(self, room: int) -> None:
        self.arrivals.pop(room, None)

    def complete(self, room: int) -> bool:
        """Whether every page of every layer was verified; True for a room that asked for none."""
        arrival = self.arrivals.get(room)
        return arrival is None or arrival.complete(self.buffers.layers)

    def compare(self, group: Group, session: str) -> Resend | None:
        """Hash what lies in the group's pages. None if it matches or is no longer wanted,
        else what to ask for again.

        Raises CorruptPages when the range has been resent too often, or for a group that
        does not lie within the request.
        """
        arrival = self.arrivals.get(group.room)
        if arrival is None or arrival.generation != group.generation:
            return None
        self._check(group, arrival)
        part = group.rank % arrival.ranks
        key = (part, group.first_layer, group.first_page)
        if self._digests(group, arrival, part) == group.digests:
            arrival.verified[key] = group.layers * group.pages
            return None
        tries = arrival.resends.get(key, 0)
        last = group.first_layer + group.layers - 1
        if tries >= MAX_RESENDS:
            raise CorruptPages(
                f"KV pages {group.first_page}..{group.first_page + group.pages - 1} of layers "
                f"{group.first_layer}..{last} arrived with wrong bytes {tries + 1} times"
            )
        arrival.resends[key] = tries + 1
        return Resend(
            room=group.room,
            generation=group.generation,
            session=session,
            first_layer=group.first_layer,
            layers=group.layers,
            first_page=group.first_page,
            pages=group.pages,
        )

    def _check(self, group: Group, arrival: Arrival) -> None:
        if (
            group.first_layer + group.layers > self.buffers.layers
            or group.first_page + group.pages > len(arrival.pages)
            or len(group.digests) != group.layers * 2
        ):
            raise CorruptPages(
                f"a prefill server announced layers {group.first_layer}+{group.layers}, pages "
                f"{group.first_page}+{group.pages} with {len(group.digests)} checksums; the "
                f"request has {self.buffers.layers} layers and {len(arrival.pages)} pages"
            )

    def _digests(self, group: Group, arrival: Arrival, part: int) -> list[int]:
        areas = []
        for layer in range(group.first_layer, group.first_layer + group.layers):
            for index in self.buffers.of_layer(layer):
                base, size = self.buffers.addresses[index], self.buffers.page_bytes[index]
                length = size // arrival.ranks
                areas.append(Area(base + part * length, size, length))
        pages = arrival.pages[group.first_page : group.first_page + group.pages]
        return digests(self.memory, areas, pages)
