"""The decode server's side of every request: its pages are verified before they may be read."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_hma.transfer import messages
from sglang_hma.transfer.base import DecodeManager
from sglang_hma.transfer.integrity import CorruptPages, HostMemory, Verifier, new_generation
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.metrics import DecodeMetrics
from sglang_hma.transfer.page_slices import Buffers, Pages, PageSlice

logger = logging.getLogger(__name__)


@dataclass
class IncomingRequest:
    """`prefill_ranks` fill one part of every page each, the k-th of them the k-th part. `reported`
    are the ranks that have sent everything, as long as that waits for verification."""

    prefill_ranks: Sequence[Address]
    reported: list[int] = field(default_factory=list)


class DecodeReceiver:
    """`session` is this server's."""

    def __init__(
        self,
        manager: DecodeManager,
        buffers: Sequence[Buffers],
        memory: HostMemory,
        session: str,
        rows: Sequence[PageSlice] = (),
    ) -> None:
        self.manager = manager
        self.session = session
        self.verifier = Verifier(buffers, memory, rows)
        self.requests: dict[int, IncomingRequest] = {}
        self.metrics = DecodeMetrics()
        self._lock = threading.Lock()

    # -- the scheduler's thread --

    def expect(
        self,
        room: int,
        pages: Sequence[Pages],
        prefill_ranks: Sequence[Address],
        row: int | None,
    ) -> None:
        """Called before prefill learns of the pages, those of each kind: what lands in them is
        compared from now on, and what lands in `row` of the metadata buffers."""
        with self._lock:
            self.requests[room] = IncomingRequest(prefill_ranks)
            self.verifier.expect(room, new_generation(), pages, len(prefill_ranks), row)

    def generation(self, room: int) -> int | None:
        arrival = self.verifier.arrivals.get(room)
        return arrival.generation if arrival is not None else None

    def forget(self, room: int) -> None:
        with self._lock:
            self.requests.pop(room, None)
            self.verifier.forget(room)

    # -- the thread that receives prefill's messages --

    def on_message(self, message: messages.Message) -> None:
        if isinstance(message, messages.Landed):
            self._on_landed(message)
        elif isinstance(message, messages.Metadata):
            self.verifier.note_metadata(message)
            self._maybe_accept(message.room)

    def _on_landed(self, landed: messages.Landed) -> None:
        began = time.thread_time()
        request = self.requests.get(landed.room)
        if request is None:
            return
        try:
            resend = self.verifier.compare(landed, self.session)
        except CorruptPages as error:
            self.metrics.mismatches.inc()
            logger.error("Room %s: %s", landed.room, error)
            self.manager.reject(landed.room, str(error))
            return
        self.metrics.groups.inc()
        self.metrics.verify_seconds.inc(time.thread_time() - began)
        if resend is not None:
            self.metrics.mismatches.inc()
            rank = request.prefill_ranks[landed.rank % len(request.prefill_ranks)]
            self.manager.tell(rank, resend)
        else:
            self._maybe_accept(landed.room)

    def _maybe_accept(self, room: int) -> None:
        """Accept what was deferred if it waits for nothing any more."""
        request = self.requests.get(room)
        if request is None or not request.reported or not self.verifier.complete(room):
            return
        reported, request.reported = request.reported, []
        if self._confirm(room, request):
            for prefill_rank in reported:
                self.manager.accept(room, prefill_rank)

    def defers_success(self, room: int, prefill_rank: int) -> bool:
        """A prefill rank reports that it has sent everything. Whether that is no success: it waits
        for pages which are not verified yet, and `manager.accept` follows, or the room has failed.
        """
        request = self.requests.get(room)
        if request is None:
            return False
        if not self.verifier.complete(room):
            request.reported.append(prefill_rank)
            return True
        return not self._confirm(room, request)

    def _confirm(self, room: int, request: IncomingRequest) -> bool:
        """Tell prefill that it may let go of the pages; False if the metadata is wrong."""
        try:
            self.verifier.check_metadata(room)
        except CorruptPages as error:
            self.metrics.mismatches.inc()
            logger.error("Room %s: %s", room, error)
            self.manager.reject(room, str(error))
            return False
        generation = self.generation(room)
        if generation is None:
            return True
        message = messages.Verified(room=room, generation=generation, session=self.session)
        for rank in request.prefill_ranks:
            self.manager.tell(rank, message)
        return True
