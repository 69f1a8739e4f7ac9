"""One request on its way from this prefill server: where it goes, and what has left so far."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_hma.kvcache.format import FULL, WINDOW
from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.messages import Resend
from sglang_hma.transfer.page_slices import (
    Block,
    Buffers,
    LayerSlices,
    PageRun,
    Pages,
    PageSlice,
    SlicePair,
    page_runs,
    slice_pairs,
)
from sglang_hma.transfer.prefill.jobs import Job, LayerRange

MAX_RESENDS_PER_ROOM = 64


@dataclass(frozen=True)
class Destination:
    """One decode rank that a request's pages go to.

    `pages` are those of each kind, `slices[kind][layer]` what this rank copies of each. `metadata`
    are the buffers of SGLang's per-request metadata (the first token and what belongs to it), one
    row a request; `row` is the request's row there.
    """

    session: str
    address: Address
    generation: int | None  # None: this peer wants no checksums
    pages: Sequence[Pages]
    slices: Sequence[LayerSlices]
    metadata: Sequence[SlicePair]
    row: int

    @classmethod
    def of(
        cls,
        info: Any,
        peer: Any,
        buffers: Sequence[Buffers],
        kv_args: Any,
        *,
        rank: tuple[int, int],
        generation: int | None,
    ) -> "Destination":
        """From SGLang's TransferInfo and KVArgsRegisterInfo of the peer, and this server's buffers
        of each kind and KVArgs; `rank` is this server's (attention-TP rank, size)."""
        targets = [peer.dst_kv_ptrs, *peer.dst_state_data_ptrs][: len(buffers)]
        windows = [np.array(each, dtype=np.int32) for each in info.dst_state_indices]
        theirs = peer.dst_tp_rank % peer.dst_attn_tp_size, peer.dst_attn_tp_size
        rows = zip(kv_args.aux_data_ptrs, peer.dst_aux_ptrs, kv_args.aux_item_lens, strict=False)
        return cls(
            session=info.mooncake_session_id,
            address=(info.endpoint, info.dst_port),
            generation=generation,
            pages=[info.dst_kv_indices, *windows][: len(buffers)],
            slices=[
                slice_pairs(ours, target, prefill=rank, decode=theirs)
                for ours, target in zip(buffers, targets, strict=True)
            ],
            metadata=tuple(
                SlicePair(PageSlice.part(source, size), PageSlice.part(target, size))
                for source, target, size in rows
            ),
            row=info.dst_aux_index,
        )

    def metadata_blocks(self, row: int) -> list[Block]:
        """Copies this server's row of every metadata buffer."""
        copy = [PageRun(row, self.row, 1)]
        return [block for pair in self.metadata for block in pair.blocks(copy)]


@dataclass(eq=False)
class OutgoingRequest:
    """`source` are this server's page ids of each kind, -1 for pages that were not queued yet;
    `layers` are as many as each kind has.

    `submitted` lists (time.perf_counter(), bytes) of what was submitted, without what was resent.
    """

    room: int
    destinations: dict[str, Destination]
    source: Sequence[Pages]
    layers: Sequence[int]
    sent: set[str] = field(default_factory=set)
    verified: set[str] = field(default_factory=set)
    all_sent_s: float | None = None
    resends: int = 0
    # The last attempt that decode has asked for, by (session, kind, first layer, first page).
    attempts: dict[tuple[str, int, int, int], int] = field(default_factory=dict)
    submitted: list[tuple[float, int]] = field(default_factory=list)
    forward: LayerGate | None = None
    last_send_s: float = 0.0

    @classmethod
    def to(
        cls, room: int, destinations: Iterable[Destination], layers: Sequence[int]
    ) -> "OutgoingRequest":
        by_session = {one.session: one for one in destinations}
        source = [
            np.full(
                max((len(one.pages[kind]) for one in by_session.values()), default=0), -1, np.int32
            )
            for kind in range(len(layers))
        ]
        return cls(room, by_session, source, layers)

    def reserved_pages(self, kind: int) -> int:
        """Pages that every decode rank has reserved."""
        return min(len(one.pages[kind]) for one in self.destinations.values())

    def jobs(self, source: Pages, index: slice, gate: LayerGate, row: int | None) -> list[Job]:
        """One job a destination for pages `source`, which are pages `index` of the request.

        `row` is the request's metadata row with the last send, else None. Raises ValueError if a
        decode rank has reserved too few pages.
        """
        if self.destinations and self.reserved_pages(FULL) < index.start + len(source):
            raise ValueError(
                f"decode reserved {self.reserved_pages(FULL)} pages, too few for the prompt"
            )
        return self._jobs(FULL, source, index.start, gate, row)

    def window_jobs(self, source: Pages, row: int) -> list[Job]:
        """One job a destination for the pages of the prompt's last window, which nobody writes any
        more. They go with the last send. Raises ValueError if these are not the pages that decode
        has reserved."""
        if (source <= 0).any():
            raise ValueError("a page of the prompt's last window was freed before it was sent")
        if any(len(one.pages[WINDOW]) != len(source) for one in self.destinations.values()):
            raise ValueError(
                f"decode reserved {self.reserved_pages(WINDOW)} pages for a window of {len(source)}"
            )
        return self._jobs(WINDOW, source, 0, LayerGate.open(self.layers[WINDOW]), row)

    def _jobs(
        self, kind: int, source: Pages, first: int, gate: LayerGate, row: int | None
    ) -> list[Job]:
        end = first + len(source)
        self.source[kind][first:end] = source
        return [
            Job(
                self.room,
                one.session,
                first,
                page_runs(source, one.pages[kind][first:end]),
                one.slices[kind],
                gate,
                metadata=one.metadata_blocks(row) if row is not None else (),
                last=row is not None,
                kind=kind,
            )
            for one in self.destinations.values()
        ]

    def resend_job(self, resend: Resend) -> Job | None:
        """None for a question that came before: nobody would wait for the write that answers it.
        Raises ValueError unless decode may ask for this range."""
        kind = resend.kind
        if kind >= len(self.layers):
            raise ValueError("decode asked again for pages of a window, and there is one pool")
        key = resend.session, kind, resend.first_layer, resend.first_page
        if resend.attempt != self.attempts.get(key, 0) + 1:
            return None
        destination = self.destinations[resend.session]
        end_layer = resend.first_layer + resend.layers
        end_page = resend.first_page + resend.pages
        source = self.source[kind][resend.first_page : end_page]
        self.resends += 1
        if (
            end_layer > self.layers[kind]
            or len(source) != resend.pages
            or (source < 0).any()
            or self.resends > MAX_RESENDS_PER_ROOM
        ):
            raise ValueError("decode asked again for pages that it has no claim to")
        self.attempts[key] = resend.attempt
        return Job(
            self.room,
            destination.session,
            resend.first_page,
            page_runs(source, destination.pages[kind][resend.first_page : end_page]),
            destination.slices[kind],
            LayerGate.open(self.layers[kind]),
            attempt=resend.attempt,
            next_layer=resend.first_layer,
            end_layer=end_layer,
            kind=kind,
        )

    def note_submitted(self, layers: LayerRange) -> None:
        if not layers.job.attempt:
            self.submitted.append((time.perf_counter(), layers.bytes))

    def note_sent(self, session: str) -> bool:
        """A destination has acknowledged everything. Whether it was the last one."""
        self.sent.add(session)
        if len(self.sent) < len(self.destinations):
            return False
        self.all_sent_s = time.monotonic()
        return True

    @property
    def arrived(self) -> bool:
        """Whether every destination has its bytes and, where it checks them, has verified them."""
        checking = {one.session for one in self.destinations.values() if one.generation is not None}
        return self.all_sent_s is not None and checking <= self.verified

    def overlap(self) -> tuple[int, int, float]:
        """(bytes, bytes submitted before the last forward pass ended, seconds since that end)."""
        gate = self.forward
        end = gate.ended_s if gate is not None and gate.ended_s else self.last_send_s
        total = sum(size for _, size in self.submitted)
        early = sum(size for when, size in self.submitted if when < end)
        return total, early, max(time.perf_counter() - end, 0.0)
