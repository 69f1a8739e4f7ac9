"""The prefill server's requests on their way to decode: what the pump sends, and what follows.

A request ends on this side when decode has confirmed its bytes (with checksums)
or when they were acknowledged (without). Until then its pages stay locked, so a
range that arrived damaged can be sent again.
"""

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sglang.srt.disaggregation.base import KVPoll

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer import messages
from sglang_hma.transfer.integrity import Buffers, HostMemory, digests
from sglang_hma.transfer.leases import Claims
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.metrics import PrefillMetrics
from sglang_hma.transfer.page_slices import Area, Pages, Piece, runs
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.send_thread import Job, Link, Part, Pump, Sending
from sglang_hma.transfer.prefill.trace import Trace

logger = logging.getLogger(__name__)

VERIFY_TIMEOUT_S = 60.0
# After a failed write the kernels may still hold bytes of it. Decode keeps the pages
# until this side says that they have drained, and it says so this much later.
QUARANTINE_S = 10.0
MAX_RESENDS_PER_ROOM = 64


@dataclass(frozen=True)
class Destination:
    """One decode rank that a room's pages go to."""

    session: str
    endpoint: str
    port: int
    generation: int | None  # None: this peer wants no checksums
    pages: Pages
    pieces: tuple[tuple[Piece, ...], ...]
    aux_index: int


@dataclass(eq=False)
class Outgoing:
    """One room."""

    destinations: dict[str, Destination]
    source: Pages
    sent: set[str] = field(default_factory=set)
    verified: set[str] = field(default_factory=set)
    all_sent_s: float | None = None
    resends: int = 0
    left: list[tuple[float, int]] = field(default_factory=list)  # when, bytes
    forward: LayerGate | None = None
    closed_s: float = 0.0


class Outbox:
    """Owner of the pump. `manager` is SGLang's KV manager; its status tables stay the truth."""

    def __init__(self, manager: Any, link: Link, memory: HostMemory, sizer: GroupSizer) -> None:
        self.manager = manager
        self.memory = memory
        self.buffers = Buffers(
            tuple(manager.kv_args.kv_data_ptrs), tuple(manager.kv_args.kv_item_lens)
        )
        self.rooms: dict[int, Outgoing] = {}
        self.metrics = PrefillMetrics()
        self.trace = Trace.from_config(f"prefill {manager.get_session_id()}", manager.attn_tp_rank)
        self.claims = Claims(expected=HmaConfig.require().packs_kv)
        self._unsettled: dict[int, float] = {}
        self._lock = threading.Lock()
        self.pump = Pump(link, self, sizer)
        self.pump.start()

    # -- the scheduler's thread --

    def add(
        self,
        room: int,
        source: Pages,
        index: slice,
        *,
        gate: LayerGate | None,
        forward: LayerGate | None,
        last: bool,
        aux: int | None,
        destinations: Iterable[Destination],
    ) -> None:
        """Queue pages `source`, which are pages `index` of the request, for every destination."""
        jobs: list[Job] = []
        with self._lock:
            outgoing = self.rooms.get(room)
            if outgoing is None:
                peers = {peer.session: peer for peer in destinations}
                total = max((len(peer.pages) for peer in peers.values()), default=0)
                outgoing = Outgoing(peers, np.full(total, -1, dtype=np.int32))
                self.rooms[room] = outgoing
            if gate is None:
                gate = LayerGate.open(self.buffers.layers)
            if forward is not None:
                outgoing.forward = forward
                self.trace.forward(forward)
            if last:
                outgoing.closed_s = time.perf_counter()
            for peer in outgoing.destinations.values():
                target = peer.pages[index]
                if len(target) < len(source):
                    break
                extra = self._aux_blocks(peer, aux) if last else ()
                cut = runs(source, target[: len(source)])
                jobs.append(
                    Job(
                        room,
                        peer.session,
                        index.start,
                        cut,
                        peer.pieces,
                        gate,
                        extra=extra,
                        last=last,
                    )
                )
            else:
                # Counted before the lock is given back: the room cannot be settled in between.
                outgoing.source[index.start : index.start + len(source)] = source
                self.manager._staging_outstanding[room] += len(jobs)
        if len(jobs) < len(outgoing.destinations):
            pages = min(len(peer.pages) for peer in outgoing.destinations.values())
            self._fail(room, f"decode reserved {pages} pages, too few for the prompt")
            return
        for job in jobs:
            self.pump.put(job)

    def _put(self, job: Job) -> None:
        self._count(job.room, 1)
        self.pump.put(job)

    def _count(self, room: int, change: int) -> None:
        """SGLang's number of sends on their way, which its drain confirmation goes by."""
        with self._lock:
            self.manager._staging_outstanding[room] += change

    def _aux_blocks(self, peer: Destination, index: int | None) -> list[tuple[int, int, int]]:
        """The first token and its company: SGLang's metadata buffers, one write each."""
        if index is None:
            raise ValueError("the last send of a request needs its metadata buffer")
        args = self.manager.kv_args
        targets = self.manager.decode_kv_args_table[peer.session].dst_aux_ptrs
        return [
            (base + length * index, target + length * peer.aux_index, length)
            for base, length, target in zip(
                args.aux_data_ptrs, args.aux_item_lens, targets, strict=False
            )
        ]

    # -- the thread that hears from decode --

    def on_message(self, message: messages.Message) -> None:
        if isinstance(message, messages.Claim):
            self.claims.claimed(message.room, (message.host, message.port))
        elif isinstance(message, messages.Held):
            self.claims.renewed(message.rooms, (message.host, message.port))
        elif isinstance(message, messages.Verified | messages.Resend):
            self._on_answer(message)

    def _on_answer(self, message: messages.Verified | messages.Resend) -> None:
        outgoing = self.rooms.get(message.room)
        peer = outgoing.destinations.get(message.session) if outgoing else None
        if outgoing is None or peer is None or peer.generation != message.generation:
            return
        if isinstance(message, messages.Verified):
            outgoing.verified.add(message.session)
            self._maybe_conclude(message.room, outgoing)
        # A success lets the scheduler reuse the pages: nothing of them is sent after it.
        elif message.session not in outgoing.verified:
            self._resend(message, outgoing, peer)

    def _resend(self, wanted: messages.Resend, outgoing: Outgoing, peer: Destination) -> None:
        end_layer, end = wanted.first_layer + wanted.layers, wanted.first_page + wanted.pages
        source = outgoing.source[wanted.first_page : end]
        outgoing.resends += 1
        if (
            end_layer > self.buffers.layers
            or len(source) != wanted.pages
            or (source < 0).any()
            or outgoing.resends > MAX_RESENDS_PER_ROOM
        ):
            self._fail(wanted.room, "decode asked again for pages that it has no claim to")
            return
        logger.warning(
            "Room %s: pages %d..%d of layers %d..%d arrived with wrong bytes, sending them again",
            wanted.room,
            wanted.first_page,
            end - 1,
            wanted.first_layer,
            end_layer - 1,
        )
        self.metrics.resends.inc()
        job = Job(
            wanted.room,
            peer.session,
            wanted.first_page,
            runs(source, peer.pages[wanted.first_page : end]),
            peer.pieces,
            LayerGate.open(self.buffers.layers),
            resent=True,
            next_layer=wanted.first_layer,
            end_layer=end_layer,
        )
        self._put(job)

    # -- the pump's thread --

    def unwanted(self, room: int) -> bool:
        return self.manager.request_status.get(room, KVPoll.Failed) == KVPoll.Failed

    def _concluded(self, room: int) -> bool:
        return self.manager.request_status.get(room) in (None, KVPoll.Success, KVPoll.Failed)

    def note(self, part: Part) -> object:
        """Checksums of what was just submitted, while it is in the cache."""
        outgoing = self.rooms.get(part.job.room)
        if outgoing is None:
            return None
        if not part.job.resent:
            outgoing.left.append((time.perf_counter(), part.bytes))
        peer = outgoing.destinations.get(part.job.session)
        if peer is None or peer.generation is None or not part.job.parts:
            return None
        began = time.thread_time()
        layers = part.job.pieces[part.first_layer : part.first_layer + part.layers]
        areas = [
            Area(piece.source, piece.source_stride, piece.length)
            for pieces in layers
            for piece in pieces
        ]
        first, pages = part.job.first_page, part.job.pages
        made = digests(self.memory, areas, outgoing.source[first : first + pages])
        self.metrics.checksum_seconds.inc(time.thread_time() - began)
        return messages.Group(
            room=part.job.room,
            generation=peer.generation,
            rank=self.manager._prefill_unique_rank(),
            first_layer=part.first_layer,
            layers=part.layers,
            first_page=first,
            pages=pages,
            digests=made,
        )

    def sent(self, sending: Sending, now_s: float) -> None:
        if not sending.failed:
            self.metrics.sent(sending.bytes, now_s - sending.started_s, sending.retries)
        self.trace.sending(sending, now_s)

    def arrived(self, part: Part) -> None:
        outgoing = self.rooms.get(part.job.room)
        peer = outgoing.destinations.get(part.job.session) if outgoing else None
        if peer is not None and part.receipt is not None:
            self._tell(peer, messages.frames(part.receipt))  # type: ignore[arg-type]

    def _tell(self, peer: Destination, frames: list[bytes]) -> None:
        self.manager.send_frames(peer.endpoint, peer.port, frames)

    def broken(self, job: Job, reason: str, *, by_peer: bool) -> None:
        if by_peer:
            self.metrics.failures.inc()
            self._unsettled[job.room] = time.monotonic() + QUARANTINE_S
            with self.manager.session_lock:
                self.manager.session_failures[job.session] += 1
                self.manager.failed_sessions.add(job.session)
        self._fail(job.room, reason)

    def _fail(self, room: int, reason: str) -> None:
        logger.error("KV transfer of room %s failed: %s", room, reason)
        self.manager.conclude_failure(bootstrap_room=room, failure_reason=reason)

    def ended(self, job: Job) -> None:
        self._count(job.room, -1)
        outgoing = self.rooms.get(job.room)
        if job.last and not job.dropped and outgoing is not None and not self.unwanted(job.room):
            outgoing.sent.add(job.session)
            if len(outgoing.sent) == len(outgoing.destinations):
                outgoing.all_sent_s = time.monotonic()
                self._account(outgoing)
                self.manager.send_kv_status_message(
                    targets=self.manager._room_notify_targets(job.room),
                    bootstrap_room=job.room,
                    status=KVPoll.Success,
                )
                self._maybe_conclude(job.room, outgoing)
        self._settle(job.room)

    def _account(self, outgoing: Outgoing) -> None:
        gate = outgoing.forward
        end = gate.ended_s if gate is not None and gate.ended_s else outgoing.closed_s
        total = sum(size for _, size in outgoing.left)
        early = sum(size for when, size in outgoing.left if when < end)
        self.metrics.request(total, early, max(time.perf_counter() - end, 0.0))

    def _maybe_conclude(self, room: int, outgoing: Outgoing) -> None:
        """Success once every destination has its bytes and, where asked for, has checked them."""
        wanted = {s for s, peer in outgoing.destinations.items() if peer.generation is not None}
        if outgoing.all_sent_s is None or not wanted <= outgoing.verified:
            return
        self.manager.update_status(room, KVPoll.Success)
        self._settle(room)

    def _settle(self, room: int) -> None:
        """Forget a room once it has ended and nothing of it is on its way."""
        manager = self.manager
        if manager._staging_outstanding.get(room, 0) > 0:
            return
        manager._maybe_ack_drained_abort(room)
        if not self._concluded(room):
            return
        with self._lock:
            if manager._staging_outstanding.get(room, 0) > 0:
                return
            manager._staging_outstanding.pop(room, None)
            self.rooms.pop(room, None)
        manager.transfer_infos.pop(room, None)
        manager.req_to_decode_prefix_len.pop(room, None)

    def idle(self) -> None:
        """What only time tells: decode that never confirms, pages that have drained by now."""
        now = time.monotonic()
        for room, since in list(self._unsettled.items()):
            if now >= since:
                self._unsettled.pop(room, None)
                self.manager._maybe_ack_drained_abort(room)
        for room, outgoing in list(self.rooms.items()):
            if self.unwanted(room):
                self._settle(room)
            elif outgoing.all_sent_s is not None and now - outgoing.all_sent_s > VERIFY_TIMEOUT_S:
                self._fail(room, f"decode did not confirm the pages within {VERIFY_TIMEOUT_S:g} s")
        for room, why in self.claims.hopeless():
            # A request that has just succeeded is no longer on decode's list either.
            if not self._concluded(room):
                self._fail(room, why)
        for room, ranks in self.claims.unopened():
            self._refuse_unopened(room, ranks)
        self.metrics.quarantined.set(len(self._unsettled))
        self.trace.flush()

    def _refuse_unopened(self, room: int, ranks: list[Address]) -> None:
        reason = f"the prefill server got no request for it in {self.claims.UNOPENED_S:g} s"
        logger.error("Room %s is waited for by %s, but %s", room, ranks, reason)
        self.manager.send_kv_status_message(
            targets=ranks,
            bootstrap_room=room,
            status=KVPoll.Failed,
            failure_reason=reason,
        )

    def settled(self, room: int) -> bool:
        """Whether no failed write of this room may still be on its way to decode."""
        return self._unsettled.get(room, 0.0) <= time.monotonic()
