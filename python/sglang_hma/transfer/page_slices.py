"""What a write carries: runs of pages, and the slice of each page that a rank gives or takes.

A BFP8 page is head-major ([kv_heads][head_dim/32][1088]) and rank r of n holds the r-th n-th of the
heads, so under unequal tensor parallelism a page of the server with more ranks is one contiguous
slice of a page of the other's. Only TP 1 on one of the sides is supported: nothing else has been
tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sglang_hma.kvcache.format import KVFormat
from sglang_hma.tensor_parallel import refuse_sizes

Pages = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Run:
    """Pages that are contiguous on both sides: one block a buffer."""

    source: int
    target: int
    pages: int


def runs(source: Pages, target: Pages) -> list[Run]:
    """Split paired page lists where either side jumps.

    Raises ValueError if the lists differ in length.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} source pages for {len(target)} target pages")
    if len(source) == 0:
        return []
    jumps = (np.diff(source) != 1) | (np.diff(target) != 1)
    starts = np.concatenate(([0], np.flatnonzero(jumps) + 1, [len(source)]))
    return [
        Run(int(source[begin]), int(target[begin]), int(end - begin))
        for begin, end in pairwise(starts)
    ]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one buffer (a layer's K or V) gives of each page, and where it goes.

    Both sides that hold the same heads exchange whole pages. Under unequal
    tensor parallelism one side's page is a contiguous piece of the other's,
    because pages are head-major; `source` and `target` then point at that piece
    in page 0.
    """

    source: int
    source_stride: int
    target: int
    target_stride: int
    length: int

    @property
    def whole(self) -> bool:
        """Whether a run of pages is one contiguous block on both sides."""
        return self.source_stride == self.target_stride == self.length

    def count(self, parts: Sequence[Run]) -> int:
        """How many blocks `blocks` would list."""
        return len(parts) if self.whole else sum(run.pages for run in parts)

    def blocks(self, parts: Sequence[Run]) -> list[tuple[int, int, int]]:
        """(source address, target address, bytes) of each write."""
        if self.whole:
            return [
                (
                    self.source + run.source * self.length,
                    self.target + run.target * self.length,
                    run.pages * self.length,
                )
                for run in parts
            ]
        return [
            (
                self.source + (run.source + i) * self.source_stride,
                self.target + (run.target + i) * self.target_stride,
                self.length,
            )
            for run in parts
            for i in range(run.pages)
        ]


@dataclass(frozen=True, slots=True)
class Area:
    """A part of every page of one registered buffer: where it starts in page 0, how far it is to
    the next page's, how long it is."""

    base: int
    stride: int
    length: int


def unsupported(fmt: KVFormat, prefill_tp: int, decode_tp: int) -> str | None:
    """Why servers with these attention-TP sizes cannot exchange pages of `fmt`, or None."""
    why = refuse_sizes(prefill_tp, decode_tp, page_format=fmt.name, kv_heads=fmt.kv_heads)
    return why and (
        f"prefill has attention TP {prefill_tp}, decode has {decode_tp}: {why}; "
        "start both with the same --tp-size"
    )


def piece(
    source: int, target: int, page_bytes: int, *, ours: tuple[int, int], theirs: tuple[int, int]
) -> Piece:
    """What one buffer of this prefill rank gives to a decode rank.

    `source` and `target` are the addresses of page 0, `page_bytes` the size of a page here;
    `ours` and `theirs` are (attention-TP rank, size). Sizes must be supported and ranks in range.
    """
    (our_rank, our_tp), (their_rank, their_tp) = ours, theirs
    if our_tp >= their_tp:
        parts = our_tp // their_tp
        place = target + our_rank % parts * page_bytes
        return Piece(source, page_bytes, place, parts * page_bytes, page_bytes)
    parts = their_tp // our_tp
    length = page_bytes // parts
    return Piece(source + their_rank % parts * length, page_bytes, target, length, length)


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
