"""Checksums of landed pages: made on prefill, compared on decode before anything reads them.

Mooncake acknowledges a write once its bytes were applied, and checks nothing:
TCP's 16-bit sum, a broken NIC or a late write of an older request are invisible
to it. So each group of pages is followed by XXH3-64 digests, one for each
(layer, K or V, run of pages), and a request becomes readable on decode only when
every page of every layer was compared.
"""

import ctypes
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from sglang_hma.transfer.grouping import Pages, Piece, Run
from sglang_hma.transfer.messages import Group, Resend

MAX_RESENDS = 2


def new_generation() -> int:
    """Tells two lives of one room apart: a late message of the first is no news to the second."""
    return secrets.randbits(63)


class HostMemory:
    """Bytes at raw addresses of this process."""

    def read(self, address: int, length: int) -> memoryview:
        return memoryview((ctypes.c_char * length).from_address(address))


class DeviceMemory:
    """Bytes at CUDA addresses, copied to the host to be hashed."""

    def __init__(self, device: str) -> None:
        self.device = device

    def read(self, address: int, length: int) -> memoryview:
        import torch

        class View:
            __cuda_array_interface__ = {
                "shape": (length,),
                "typestr": "|u1",
                "data": (address, True),
                "version": 3,
            }

        return memoryview(torch.as_tensor(View(), device=self.device).cpu().numpy())


Memory = HostMemory | DeviceMemory


def memory_of(device: str) -> Memory:
    return HostMemory() if device == "cpu" else DeviceMemory(device)


def digest(memory: Memory, blocks: Sequence[tuple[int, int]]) -> int:
    """XXH3-64 of the (address, length) blocks, one after the other."""
    if len(blocks) == 1:
        return int(xxhash.xxh3_64_intdigest(memory.read(*blocks[0])))
    state = xxhash.xxh3_64()
    for address, length in blocks:
        state.update(memory.read(address, length))
    return int(state.intdigest())


def piece_digests(
    memory: Memory, layers: Sequence[Sequence[Piece]], parts: Sequence[Run]
) -> list[int]:
    """What a sender announces: one digest for every (layer, K or V, run of pages)."""
    return [
        digest(memory, [(source, length) for source, _, length in piece.blocks([run])])
        for pieces in layers
        for piece in pieces
        for run in parts
    ]


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
    mismatches: int = 0

    def complete(self, layers: int) -> bool:
        return sum(self.verified.values()) == layers * len(self.pages) * self.ranks


class CorruptPages(Exception):
    """A range did not match after MAX_RESENDS further tries, or a message made no sense."""


class Verifier:
    """Decode's side: compares groups with the bytes that arrived. Not thread safe:
    one thread receives a server's messages."""

    def __init__(self, buffers: Buffers, memory: Memory) -> None:
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
        arrival.mismatches += 1
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
            or len(group.digests) != group.layers * 2 * len(group.run_pages)
        ):
            raise CorruptPages(
                f"a prefill server announced layers {group.first_layer}+{group.layers}, pages "
                f"{group.first_page}+{group.pages} with {len(group.digests)} checksums; the "
                f"request has {self.buffers.layers} layers and {len(arrival.pages)} pages"
            )

    def _digests(self, group: Group, arrival: Arrival, part: int) -> list[int]:
        parts, found = arrival.ranks, []
        for layer in range(group.first_layer, group.first_layer + group.layers):
            for index in self.buffers.of_layer(layer):
                base, size = self.buffers.addresses[index], self.buffers.page_bytes[index]
                length = size // parts
                at = group.first_page
                for count in group.run_pages:
                    pages = arrival.pages[at : at + count]
                    at += count
                    if parts == 1 and bool((np.diff(pages) == 1).all()):
                        blocks = [(base + int(pages[0]) * size, count * size)]
                    else:
                        blocks = [(base + int(p) * size + part * length, length) for p in pages]
                    found.append(digest(self.memory, blocks))
        return found
