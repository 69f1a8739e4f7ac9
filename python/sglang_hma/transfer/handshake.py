"""Whether two servers may exchange KV pages: both sides decide before any byte moves.

Decode reads prefill's format descriptor from the bootstrap server. Prefill reads decode's from its
registration message, so that a stock SGLang server, which checks nothing, is refused as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from sglang_hma.kvcache.format import FULL, WINDOW, KVFormat, mismatch
from sglang_hma.transfer.messages import Introduction
from sglang_hma.transfer.page_slices import check_page_bytes, unsupported
from sglang_hma.transfer.sglang_messages import ADDRESS_END, Registration


@dataclass(frozen=True)
class OwnMemory:
    """What this server has registered: of each kind of pages `page_bytes` of each KV buffer and
    `pages` in each, `row_bytes` of each metadata buffer, `rows` in each."""

    page_bytes: tuple[tuple[int, ...], ...]
    pages: tuple[int, ...]
    row_bytes: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, kv_args: Any, kinds: int) -> "OwnMemory":
        """From SGLang's KVArgs."""
        sizes = [kv_args.kv_item_lens, *kv_args.state_item_lens][:kinds]
        lengths = [kv_args.kv_data_lens, *kv_args.state_data_lens][:kinds]
        row_bytes = tuple(kv_args.aux_item_lens)
        return cls(
            tuple(map(tuple, sizes)),
            tuple(map(_items, lengths, sizes)),
            row_bytes,
            _items(kv_args.aux_data_lens, row_bytes),
        )


def _items(sizes: Sequence[int], item_sizes: Sequence[int]) -> int:
    """How many items every buffer has; at least 1. Buffers without items are not counted."""
    counts = [size // item for size, item in zip(sizes, item_sizes, strict=True) if size and item]
    return min(counts, default=1)


class Handshake:
    """One server's side.

    `layout` is its descriptor. `stock_allowed`: a peer without a descriptor is accepted as a stock
    SGLang server. `plain`: the pool has K and V pages of heads; SGLang itself checks all others.
    """

    def __init__(
        self,
        layout: str,
        memory: OwnMemory,
        *,
        role: str,
        attn_tp: int,
        stock_allowed: bool,
        plain: bool,
    ) -> None:
        self.layout = layout
        self.memory = memory
        self.role = role
        self.attn_tp = attn_tp
        self.stock_allowed = stock_allowed
        self.plain = plain

    @cached_property
    def format(self) -> KVFormat:
        """Of this server, if its pages are ours."""
        return KVFormat.parse(self.layout)

    def frame(self) -> bytes:
        """What a decode server appends to its registration message."""
        return Introduction(self.layout, list(self.memory.pages), self.memory.rows).frame()

    def refuse_prefill(self, route: dict[str, Any]) -> str | None:
        """Why this decode server refuses a prefill server, or None; `route` is from its bootstrap
        server."""
        theirs = route.get("kv_layout")
        text = theirs if isinstance(theirs, str) else None
        reason = self._mismatch(text, their_role="prefill")
        if reason is not None or text is None:
            return reason
        return self._refuse_tp(route.get("attn_tp_size"))

    def refuse_decode(self, peer: Registration) -> str | None:
        """Why this prefill server refuses a decode rank, or None."""
        try:
            introduction = introduction_of(peer)
        except ValueError as error:
            return f"decode server {peer.address[0]}: {error}"
        layout = introduction.layout if introduction is not None else None
        reason = self._mismatch(layout, their_role="decode")
        if reason is not None:
            return reason
        ours = self.memory
        if len(peer.buffers) != len(ours.page_bytes[FULL]):
            return (
                f"the decode server registered {len(peer.buffers)} KV buffers, "
                f"this one has {len(ours.page_bytes[FULL])}"
            )
        if not self.plain:
            return None
        kinds = len(ours.pages)
        registered = [tuple(map(len, each)) for each in (peer.state, peer.state_bytes)]
        expected = tuple(map(len, ours.page_bytes[WINDOW:]))
        if any(found != expected for found in registered):
            return (
                f"the decode server registered {registered[0]} buffers of state, this one has "
                f"{expected}"
            )
        if introduction is not None and len(introduction.pages) != kinds:
            return (
                f"the decode server has {len(introduction.pages)} kinds of pages, this one {kinds}"
            )
        if introduction is not None and len(peer.metadata) != len(ours.row_bytes):
            return (
                f"the decode server registered {len(peer.metadata)} metadata buffers, "
                f"this one has {len(ours.row_bytes)}"
            )
        theirs = peer.page_bytes, *peer.state_bytes
        sizes = zip(ours.page_bytes, theirs, strict=True)
        wrong = (check_page_bytes(*pair, self.attn_tp, peer.tp) for pair in sizes)
        return (
            self._refuse_tp(peer.tp)
            or next(filter(None, wrong), None)
            or self._refuse_places(peer, introduction)
        )

    def _refuse_places(self, peer: Registration, introduction: Introduction | None) -> str | None:
        """Buffers that run into each other, or out of any address space. A stock SGLang server does
        not say how many pages it has."""
        kinds, rows = (introduction.pages, introduction.rows) if introduction else ([1], 1)
        starts, sizes = (peer.buffers, *peer.state), (peer.page_bytes, *peer.state_bytes)
        spans = [
            (start, start + pages * size)
            for pages, of_kind, bytes_of_kind in zip(kinds, starts, sizes, strict=True)
            for start, size in zip(of_kind, bytes_of_kind, strict=True)
        ]
        metadata = zip(peer.metadata, self.memory.row_bytes, strict=False)
        spans = sorted([*spans, *((start, start + rows * size) for start, size in metadata)])
        shown = " and ".join(map(str, kinds))
        if any(not 0 < start < end < ADDRESS_END for start, end in spans):
            return f"the decode server's buffers of {shown} pages do not lie in 1..2^57-1"
        if any(start < end for (_, end), (start, _) in pairwise(spans)):
            return f"the decode server's buffers of {shown} pages overlap"
        return None

    def _refuse_tp(self, theirs: Any) -> str | None:
        if not isinstance(theirs, int) or theirs < 1:
            return f"the peer says that its attention TP size is {theirs!r}"
        sizes = (self.attn_tp, theirs) if self.role == "prefill" else (theirs, self.attn_tp)
        return unsupported(self.format, *sizes)

    def _mismatch(self, theirs: str | None, *, their_role: str) -> str | None:
        if theirs is None and self.stock_allowed:
            return None
        return mismatch(self.layout, theirs, our_role=self.role, their_role=their_role)


def introduction_of(peer: Registration) -> Introduction | None:
    """What a decode rank says beside SGLang's registration; None of a stock SGLang server.

    Raises ValueError for a malformed one, and for one of another version.
    """
    return Introduction.parse(peer.extra[0]) if peer.extra else None
