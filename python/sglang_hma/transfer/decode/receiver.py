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
from sglang_hma.transfer.page_slices import Buffers, Pages

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
        self, manager: DecodeManager, buffers: Buffers, memory: HostMemory, session: str
    ) -> None:
        self.manager = manager
        self.session = session
        self.verifier = Verifier(buffers, memory)
        self.requests: dict[int, IncomingRequest] = {}
        self.metrics = DecodeMetrics()
        self._lock = threading.Lock()

    # -- the scheduler's thread --

    def expect(self, room: int, pages: Pages, prefill_ranks: Sequence[Address]) -> None:
        """Called before prefill learns of the pages: what lands in them is compared from now on."""
        with self._lock:
            self.requests[room] = IncomingRequest(prefill_ranks)
            self.verifier.expect(room, new_generation(), pages, len(prefill_ranks))

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
        elif request.reported and self.verifier.complete(landed.room):
            self._confirm(landed.room, request)
            reported, request.reported = request.reported, []
            for prefill_rank in reported:
                self.manager.accept(landed.room, prefill_rank)

    def defers_success(self, room: int, prefill_rank: int) -> bool:
        """A prefill rank reports that it has sent everything. Whether that waits for pages which
        are not verified yet; `manager.accept` follows then."""
        request = self.requests.get(room)
        if request is None:
            return False
        if not self.verifier.complete(room):
            request.reported.append(prefill_rank)
            return True
        self._confirm(room, request)
        return False

    def _confirm(self, room: int, request: IncomingRequest) -> None:
        """Prefill may let go of the pages."""
        generation = self.generation(room)
        if generation is None:
            return
        message = messages.Verified(room=room, generation=generation, session=self.session)
        for rank in request.prefill_ranks:
            self.manager.tell(rank, message)
