"""Which bytes of which pages are copied.

A page is one page id in one registered buffer: the K or the V of one layer. Servers with equal
tensor parallelism exchange whole pages, and pages that are contiguous on both sides are one block.

A BFP8 page is head-major ([kv_heads][head_dim/32][1088 bytes]) and rank r of n has the r-th n-th
of the heads. So with unequal tensor parallelism a whole page of the server with more ranks is a
contiguous slice of a page of the other. One of the two sizes must be 1: other combinations have
not been tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sglang_hma.kvcache.format import KVFormat
from sglang_hma.tensor_parallel import refuse_sizes

Pages = npt.NDArray[np.int32]
Addresses = npt.NDArray[np.int64]
Block = tuple[int, int, int]  # source address, target address, bytes


@dataclass(frozen=True, slots=True)
class PageRun:
    """Consecutive pages here that go to consecutive pages there; `source` and `target` are the
    first page ids."""

    source: int
    target: int
    pages: int


def page_runs(source: Pages, target: Pages) -> list[PageRun]:
    """Split paired page lists wherever either side jumps.

    Raises ValueError if the lists differ in length.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} source pages for {len(target)} target pages")
    if len(source) == 0:
        return []
    jumps = (np.diff(source) != 1) | (np.diff(target) != 1)
    starts = np.concatenate(([0], np.flatnonzero(jumps) + 1, [len(source)]))
    return [
        PageRun(int(source[begin]), int(target[begin]), int(end - begin))
        for begin, end in pairwise(starts)
    ]


@dataclass(frozen=True, slots=True)
class PageSlice:
    """The same byte range of every page of one buffer.

    `base` is its address in page 0, `stride` the distance to the same range of the next page,
    `length` its size in bytes.
    """

    base: int
    stride: int
    length: int

    @classmethod
    def part(cls, buffer: int, page_bytes: int, index: int = 0, parts: int = 1) -> "PageSlice":
        """The index-th of `parts` equal parts of each page; `buffer` is the address of page 0."""
        length = page_bytes // parts
        return cls(buffer + index * length, page_bytes, length)

    def addresses(self, pages: Pages) -> Addresses:
        """Of the slice in each of these pages."""
        return self.base + self.stride * pages.astype(np.int64)


@dataclass(frozen=True, slots=True)
class SlicePair:
    """A slice of prefill's pages and the slice of decode's pages, as long, that it is copied to."""

    source: PageSlice
    target: PageSlice

    @property
    def length(self) -> int:
        return self.source.length

    @property
    def whole_pages(self) -> bool:
        """Whether both slices are whole pages; a run of pages is then one block."""
        return self.source.stride == self.target.stride == self.length

    def block_count(self, runs: Sequence[PageRun]) -> int:
        """How many blocks `blocks` would list."""
        return len(runs) if self.whole_pages else sum(run.pages for run in runs)

    def blocks(self, runs: Sequence[PageRun]) -> list[Block]:
        """What has to be copied for these pages."""
        source, target, length = self.source, self.target, self.length
        if self.whole_pages:
            return [
                (
                    source.base + run.source * length,
                    target.base + run.target * length,
                    run.pages * length,
                )
                for run in runs
            ]
        return [
            (
                source.base + (run.source + i) * source.stride,
                target.base + (run.target + i) * target.stride,
                length,
            )
            for run in runs
            for i in range(run.pages)
        ]


LayerSlices = Sequence[Sequence[SlicePair]]  # of each layer its K and V


@dataclass(frozen=True)
class Buffers:
    """One server's registered KV buffers: the address of page 0 and a page's bytes of each.

    As SGLang lists them: K of every layer, then V of every layer.
    """

    addresses: tuple[int, ...]
    page_bytes: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.addresses) // 2

    def slices(self, layer: int, index: int = 0, parts: int = 1) -> list[PageSlice]:
        """The index-th of `parts` equal parts of a layer's K pages, and of its V pages."""
        return [
            PageSlice.part(self.addresses[buffer], self.page_bytes[buffer], index, parts)
            for buffer in (layer, self.layers + layer)
        ]


def slice_pairs(
    source: Buffers, target: Sequence[int], *, prefill: tuple[int, int], decode: tuple[int, int]
) -> LayerSlices:
    """What this prefill rank copies to one decode rank.

    `target` are the addresses of the decode rank's buffers, in the order of `source`; `prefill`
    and `decode` are (attention-TP rank, size). Sizes must be supported and ranks in range.
    Raises ValueError if the numbers of buffers differ.
    """
    if len(target) != len(source.addresses):
        raise ValueError(f"{len(source.addresses)} source buffers for {len(target)} target buffers")
    (prefill_rank, prefill_tp), (decode_rank, decode_tp) = prefill, decode
    source_parts = max(1, decode_tp // prefill_tp)
    target_parts = max(1, prefill_tp // decode_tp)
    page_bytes = tuple(size // source_parts * target_parts for size in source.page_bytes)
    theirs = Buffers(tuple(target), page_bytes)
    return tuple(
        tuple(
            SlicePair(*pair)
            for pair in zip(
                source.slices(layer, decode_rank % source_parts, source_parts),
                theirs.slices(layer, prefill_rank % target_parts, target_parts),
                strict=True,
            )
        )
        for layer in range(source.layers)
    )


def unsupported(fmt: KVFormat, prefill_tp: int, decode_tp: int) -> str | None:
    """Why servers with these attention-TP sizes cannot exchange pages of `fmt`, or None."""
    why = refuse_sizes(prefill_tp, decode_tp, page_format=fmt.name, kv_heads=fmt.kv_heads)
    return why and (
        f"prefill has attention TP {prefill_tp}, decode has {decode_tp}: {why}; "
        "start both with the same --tp-size"
    )


def check_page_bytes(
    ours: Sequence[int], theirs: Sequence[int], prefill_tp: int, decode_tp: int
) -> str | None:
    """Why a decode rank's page sizes do not fit this prefill rank's, buffer by buffer, or None."""
    for mine, other in zip(ours, theirs, strict=False):
        if mine * prefill_tp != other * decode_tp:
            return (
                f"the decode server's pages have {other} bytes at attention TP {decode_tp}, "
                f"this one's {mine} at {prefill_tp}"
            )
    return None
