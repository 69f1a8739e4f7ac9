"""Checksums of landed pages: made on prefill, compared on decode before anything reads them.

Mooncake acknowledges a write when its bytes have been stored, and checks none of them. It does not
notice what TCP's 16-bit sum misses, a broken NIC, or a late write of an earlier request. So each
range of pages is followed by XXH3-64 digests, one for each layer's K and one for its V, and decode
may read a request only when every page of every layer has been compared.
"""

import ctypes
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from hma_kernels.xxh3 import suits, xxh3_64
from sglang_hma.transfer.messages import Landed, Metadata, Resend
from sglang_hma.transfer.page_slices import Addresses, Buffers, Pages, PageSlice

MAX_RESENDS = 2

Hashes = npt.NDArray[np.uint64]
Range = tuple[int, int, int, int]


def new_generation() -> int:
    """A number that no earlier request of the same room had."""
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


def digests(memory: HostMemory, slices: Sequence[PageSlice], pages: Pages) -> list[int]:
    """For each slice the XXH3-64 of its pages' XXH3-64, each as 8 little-endian bytes.

    Pages are hashed one by one, so that a device can do it in parallel. Slices of one length go
    into one call.
    """
    found = [0] * len(slices)
    for length in {part.length for part in slices}:
        chosen = [index for index, part in enumerate(slices) if part.length == length]
        addresses = np.concatenate([slices[index].addresses(pages) for index in chosen])
        hashes = memory.hashes(addresses, length).astype("<u8")
        for index, row in zip(chosen, hashes.reshape(len(chosen), len(pages)), strict=True):
            found[index] = int(xxhash.xxh3_64_intdigest(row.tobytes()))
    return found


def row_digest(parts: Iterable[tuple[int, int]]) -> int:
    """XXH3-64 of (address, bytes) of this process's memory, one after the other."""
    memory, made = HostMemory(), xxhash.xxh3_64()
    for address, length in parts:
        made.update(memory.read(address, length))
    return int(made.intdigest())


@dataclass
class Arrival:
    """One request's pages on decode, by kind, while they arrive."""

    generation: int
    pages: Sequence[Pages]
    ranks: int  # prefill ranks that fill these pages, each an equal part of every page
    row: int | None = None  # of the metadata buffers; None: the metadata is not compared
    # Both by (kind, part, first layer, first page) of a range: pages compared, times asked again.
    verified: dict[Range, int] = field(default_factory=dict)
    resends: dict[Range, int] = field(default_factory=dict)
    # By prefill rank: (buffers, digest) of the request's metadata, which each of them writes.
    metadata: dict[int, tuple[int, int]] = field(default_factory=dict)

    def complete(self, layers: Sequence[int]) -> bool:
        """`layers`: of each kind."""
        found = sum(self.verified.values())
        told = self.row is None or len(self.metadata) == self.ranks
        due = sum(count * len(pages) for count, pages in zip(layers, self.pages, strict=True))
        return told and found == due * self.ranks


class CorruptPages(Exception):
    """A range still differs after MAX_RESENDS more tries, the metadata differs, or a message names
    pages that the request does not have."""


class Verifier:
    """Decode's side: compares the bytes that arrived with the digests that prefill sent.

    `buffers` are those of each kind of pages; `rows` are SGLang's metadata buffers, in this
    process's memory, with a row a request. All but `expect` and `forget` is called by the one
    thread that receives a server's messages.
    """

    def __init__(
        self, buffers: Sequence[Buffers], memory: HostMemory, rows: Sequence[PageSlice] = ()
    ) -> None:
        self.buffers = buffers
        self._layers = [each.layers for each in buffers]
        self.memory = memory
        self.rows = rows
        self.arrivals: dict[int, Arrival] = {}

    def expect(
        self,
        room: int,
        generation: int,
        pages: Sequence[Pages],
        ranks: int,
        row: int | None = None,
    ) -> None:
        """`pages`: of each kind."""
        kept = [np.array(each, dtype=np.int32) for each in pages]
        self.arrivals[room] = Arrival(generation, kept, ranks, row)

    def forget(self, room: int) -> None:
        self.arrivals.pop(room, None)

    def complete(self, room: int) -> bool:
        """Whether every page of every layer was verified and every rank has told the digest of its
        metadata; True for a room that asked for none."""
        arrival = self.arrivals.get(room)
        return arrival is None or arrival.complete(self._layers)

    def note_metadata(self, told: Metadata) -> None:
        arrival = self.arrivals.get(told.room)
        if arrival is not None and arrival.generation == told.generation:
            arrival.metadata[told.rank % arrival.ranks] = told.buffers, told.digest

    def check_metadata(self, room: int) -> None:
        """Compare the metadata of a complete room: the first token and what belongs to it.

        Several prefill ranks write the same row, and whichever was last must have said so. Raises
        CorruptPages if none did.
        """
        arrival = self.arrivals.get(room)
        if arrival is None or arrival.row is None:
            return
        for buffers, digest in arrival.metadata.values():
            row = [(part.base + arrival.row * part.stride, part.length) for part in self.rows]
            if buffers <= len(row) and row_digest(row[:buffers]) == digest:
                return
        raise CorruptPages("the first token arrived with wrong bytes")

    def compare(self, landed: Landed, session: str) -> Resend | None:
        """Hash the range's pages. None if they match or the request has ended, else what to ask
        for again; `session` is this server's. A range is asked for once after each attempt, however
        often that is announced: a write that nobody waits for could land in pages that are read.

        Raises CorruptPages when the range has been resent too often, or does not lie within the
        request.
        """
        arrival = self.arrivals.get(landed.room)
        if arrival is None or arrival.generation != landed.generation:
            return None
        self._check(landed, arrival)
        part = landed.rank % arrival.ranks
        key = (landed.kind, part, landed.first_layer, landed.first_page)
        tries = arrival.resends.get(key, 0)
        if key in arrival.verified or landed.attempt != tries:
            return None
        if self._digests(landed, arrival, part) == landed.digests:
            arrival.verified[key] = landed.layers * landed.pages
            return None
        last = landed.first_layer + landed.layers - 1
        if tries >= MAX_RESENDS:
            raise CorruptPages(
                f"KV pages {landed.first_page}..{landed.first_page + landed.pages - 1} of layers "
                f"{landed.first_layer}..{last} arrived with wrong bytes {tries + 1} times"
            )
        arrival.resends[key] = tries + 1
        return Resend(
            room=landed.room,
            generation=landed.generation,
            session=session,
            first_layer=landed.first_layer,
            layers=landed.layers,
            first_page=landed.first_page,
            pages=landed.pages,
            attempt=tries + 1,
            kind=landed.kind,
        )

    def _check(self, landed: Landed, arrival: Arrival) -> None:
        if landed.kind >= len(self.buffers):
            raise CorruptPages(
                "a prefill server announced pages of a window, and there is one pool"
            )
        layers, pages = self._layers[landed.kind], len(arrival.pages[landed.kind])
        if (
            landed.first_layer + landed.layers > layers
            or landed.first_page + landed.pages > pages
            or len(landed.digests) != landed.layers * 2
        ):
            raise CorruptPages(
                f"a prefill server announced layers {landed.first_layer}+{landed.layers}, pages "
                f"{landed.first_page}+{landed.pages} with {len(landed.digests)} checksums; the "
                f"request has {layers} layers and {pages} pages"
            )

    def _digests(self, landed: Landed, arrival: Arrival, part: int) -> list[int]:
        slices = [
            of_buffer
            for layer in range(landed.first_layer, landed.first_layer + landed.layers)
            for of_buffer in self.buffers[landed.kind].slices(layer, part, arrival.ranks)
        ]
        end = landed.first_page + landed.pages
        pages = arrival.pages[landed.kind][landed.first_page : end]
        return digests(self.memory, slices, pages)
