"""The prefill server's side of every request: queues its pages, answers decode, concludes it.

A request ends here when decode has verified its bytes, or, where decode makes no checksums, when
they are acknowledged. Until then its pages stay locked, so that a range can be sent again.
"""

import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from operator import attrgetter

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer import messages
from sglang_hma.transfer.base import PrefillManager
from sglang_hma.transfer.claims import Claims
from sglang_hma.transfer.drain import NETWORK_S, Drain
from sglang_hma.transfer.integrity import HostMemory, digests, row_digest
from sglang_hma.transfer.metrics import PrefillMetrics
from sglang_hma.transfer.page_slices import Pages
from sglang_hma.transfer.prefill.jobs import EarlySend, Group, Job, LayerRange
from sglang_hma.transfer.prefill.link import Link
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.outgoing import Destination, OutgoingRequest
from sglang_hma.transfer.prefill.send_thread import SendThread
from sglang_hma.transfer.prefill.trace import Trace
from sglang_hma.transfer.tcp_table import addresses_of, connections

logger = logging.getLogger(__name__)

VERIFY_TIMEOUT_S = 60.0
STRAYS_S = 5.0


class PrefillSender:
    """The send thread's listener. `rank` is this prefill rank's number in messages to decode,
    `layers` the number of layers of a request, `hashing` what makes checksums, else a thread."""

    def __init__(
        self,
        manager: PrefillManager,
        link: Link,
        memory: HostMemory,
        sizer: GroupSizer,
        trace: Trace,
        *,
        layers: int,
        rank: int,
        hashing: Executor | None = None,
    ) -> None:
        self.manager = manager
        self.memory = memory
        self.trace = trace
        self.layers = layers
        self.rank = rank
        self.requests: dict[int, OutgoingRequest] = {}
        self.metrics = PrefillMetrics()
        self.claims = Claims(expected=HmaConfig.require().packs_kv)
        self._draining: dict[int, Drain] = {}  # rooms with failed writes
        self._strays_s = 0.0  # when it was last looked for them
        self._hashing = hashing or ThreadPoolExecutor(1, thread_name_prefix="hma-hash")
        self._lock = threading.Lock()
        self.thread = SendThread(link, self, sizer)

    # -- the scheduler's thread --

    def add(
        self,
        room: int,
        source: Pages,
        index: slice,
        *,
        early: EarlySend | None,
        metadata_row: int | None,
        destinations: Iterable[Destination],
    ) -> None:
        """Queue pages `source`, which are pages `index` of the request, for every destination.

        `metadata_row` is given with the last pages of the request. `destinations` is read at the
        first call for a room only.
        """
        with self._lock:
            request = self.requests.get(room)
            if request is None:
                request = OutgoingRequest.to(room, destinations, self.layers)
                self.requests[room] = request
            if early is not None:
                request.forward = early.forward
                self.trace.forward(early.forward)
            if metadata_row is not None:
                request.last_send_s = time.perf_counter()
            gate = early.gate if early is not None else LayerGate.open(self.layers)
            try:
                jobs = request.jobs(source, index, gate, metadata_row)
            except ValueError as error:
                jobs, reason = [], str(error)
            else:
                # Counted before the lock is released: the room cannot be settled in between.
                reason = ""
                self.manager.add_sends(room, len(jobs))
        if reason:
            self._fail(room, reason)
        for job in jobs:
            self.thread.put(job)

    # -- the thread that receives decode's messages --

    def on_message(self, message: messages.Message) -> None:
        if isinstance(message, messages.Claim):
            self.claims.claimed(message.room, (message.host, message.port))
        elif isinstance(message, messages.Renewal):
            self.claims.renewed(message.rooms, (message.host, message.port))
        elif isinstance(message, messages.Verified | messages.Resend):
            request = self.requests.get(message.room)
            destination = request.destinations.get(message.session) if request else None
            if request is None or destination is None:
                return
            if destination.generation != message.generation:
                return
            if isinstance(message, messages.Verified):
                request.verified.add(message.session)
                self._maybe_conclude(request)
            # A success lets the scheduler reuse the pages: none of them is sent after it.
            elif message.session not in request.verified:
                self._resend(request, message)

    def _resend(self, request: OutgoingRequest, resend: messages.Resend) -> None:
        try:
            job = request.resend_job(resend)
        except ValueError as error:
            self._fail(request.room, str(error))
            return
        if job is None:
            return
        logger.warning(
            "Room %s: pages %d..%d of layers %d..%d arrived with wrong bytes, sending them again",
            request.room,
            resend.first_page,
            resend.first_page + resend.pages - 1,
            resend.first_layer,
            resend.first_layer + resend.layers - 1,
        )
        self.metrics.resends.inc()
        with self._lock:
            self.manager.add_sends(request.room, 1)
        self.thread.put(job)

    # -- the send thread --

    def is_cancelled(self, room: int) -> bool:
        return self.manager.is_failed(room)

    def on_submitted(self, layers: LayerRange) -> Future[messages.Landed] | None:
        """Checksums are made in a thread of their own, while the bytes are on the wire."""
        job = layers.job
        request = self.requests.get(job.room)
        if request is None:
            return None
        request.note_submitted(layers)
        destination = request.destinations.get(job.session)
        if destination is None or destination.generation is None or not job.runs:
            return None
        pages = request.source[job.first_page : job.first_page + job.pages]
        return self._hashing.submit(self._announcement, layers, destination.generation, pages)

    def _announcement(self, layers: LayerRange, generation: int, pages: Pages) -> messages.Landed:
        began = time.thread_time()
        made = digests(self.memory, [pair.source for pair in layers.slices], pages)
        self.metrics.checksum_seconds.inc(time.thread_time() - began)
        return messages.Landed(
            room=layers.job.room,
            generation=generation,
            rank=self.rank,
            first_layer=layers.first_layer,
            layers=layers.layers,
            first_page=layers.job.first_page,
            pages=layers.job.pages,
            digests=made,
            attempt=layers.job.attempt,
        )

    def on_group_done(self, group: Group, now_s: float) -> None:
        if group.failed:
            self._drain(group)
        else:
            self.metrics.sent(group.bytes, now_s - group.started_s)
        self.trace.group(group, now_s)

    def _drain(self, group: Group) -> None:
        """Rooms of a failed group are not drained before this host holds nothing of it."""
        host = group.ranges[0].job.session.rpartition(":")[0]
        peer, rows = addresses_of(host), connections()
        theirs = [each for each in rows if not peer or each.remote[0] in peer]
        for layers in group.ranges:
            drain = Drain(theirs, attrgetter("sending"), least_s=NETWORK_S)
            self._draining[layers.job.room] = drain

    def on_acked(self, layers: LayerRange) -> None:
        if layers.announcement is not None:
            layers.announcement.add_done_callback(lambda made: self._announce(layers, made))

    def _announce(self, layers: LayerRange, made: Future[messages.Landed]) -> None:
        """In the thread that makes checksums, or the send thread if they were made sooner."""
        request = self.requests.get(layers.job.room)
        destination = request.destinations.get(layers.job.session) if request else None
        if destination is None:
            return
        if (error := made.exception()) is not None:
            logger.error("No checksums for room %s", layers.job.room, exc_info=error)
            self._fail(layers.job.room, f"checksums could not be made: {error}")
        else:
            self.manager.tell(destination.address, made.result())

    def on_failed(self, job: Job, reason: str, *, by_peer: bool) -> None:
        if by_peer:
            self.metrics.failures.inc()
            self.manager.suspect(job.session)
        if not self.manager.is_failed(job.room):
            self._fail(job.room, reason)

    def on_done(self, job: Job) -> None:
        with self._lock:
            self.manager.add_sends(job.room, -1)
        if job.last and not job.dropped and not self.is_cancelled(job.room):
            self._on_all_acked(job)
        self._settle(job.room)

    def _on_all_acked(self, job: Job) -> None:
        request = self.requests.get(job.room)
        if request is None:
            return
        destination = request.destinations.get(job.session)
        if destination is not None and destination.generation is not None and job.metadata:
            self.manager.tell(
                destination.address,
                messages.Metadata(
                    room=job.room,
                    generation=destination.generation,
                    rank=self.rank,
                    buffers=len(job.metadata),
                    digest=row_digest((source, length) for source, _, length in job.metadata),
                ),
            )
        if request.note_sent(job.session):
            self.metrics.request(*request.overlap())
            self.manager.report_sent(job.room)
            self._maybe_conclude(request)

    def on_tick(self) -> None:
        now = time.monotonic()
        self._look_at_drains()
        for room, request in list(self.requests.items()):
            sent_s = request.all_sent_s
            if self.is_cancelled(room):
                self._settle(room)
            elif sent_s is not None and now - sent_s > VERIFY_TIMEOUT_S:
                self._fail(room, f"decode did not confirm the pages within {VERIFY_TIMEOUT_S:g} s")
        for room, reason in self.claims.lost():
            # A request that has just succeeded is no longer on decode's list either.
            if not self.manager.is_concluded(room):
                self._fail(room, reason)
        for room, ranks in self.claims.unopened():
            reason = f"the prefill server got no request for it in {self.claims.UNOPENED_S:g} s"
            logger.error("Room %s is waited for by %s, but %s", room, ranks, reason)
            self.manager.report_unopened(room, ranks, reason)
        for room, ranks, reason in self.claims.refusals():
            self.manager.report_unopened(room, ranks, reason)
        if now - self._strays_s > STRAYS_S:
            self._strays_s = now
            self.manager.forget_strays()
        self.trace.flush()

    def _look_at_drains(self) -> None:
        if not self._draining:
            return
        rows = connections()
        for room, drain in list(self._draining.items()):
            if drain.update(rows):
                del self._draining[room]
                self.manager.confirm_drained(room)

    # -- any of these threads --

    def _fail(self, room: int, reason: str) -> None:
        logger.error("KV transfer of room %s failed: %s", room, reason)
        self.manager.fail(room, reason)

    def _maybe_conclude(self, request: OutgoingRequest) -> None:
        if request.arrived:
            self.manager.succeed(request.room)
            self._settle(request.room)

    def _settle(self, room: int) -> None:
        """Forget a room once it has ended and nothing of it is queued or being written."""
        if self.manager.sends(room) > 0:
            return
        self.manager.confirm_drained(room)
        if not self.manager.is_concluded(room):
            return
        with self._lock:
            if self.manager.sends(room) > 0:
                return
            self.requests.pop(room, None)
            self.manager.close_room(room)

    def count_unsettled(self) -> int:
        return len(self._draining)

    def is_drained(self, room: int) -> bool:
        """Whether no failed write of this room can still leave this host."""
        return room not in self._draining
