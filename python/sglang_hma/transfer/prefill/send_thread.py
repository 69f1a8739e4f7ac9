"""The prefill server's sending thread: layers leave as they become final.

One thread serves all peers. Writes are submitted and polled, never waited for in
Mooncake (whose waiting spins on a core that the forward needs), and each peer has
a window of two groups: while one is on the wire the next is collected, so the
group size follows the link by itself. A dead peer holds up nobody else.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.page_slices import Piece, Run
from sglang_hma.transfer.prefill.link_model import GroupSizer, LinkModel

logger = logging.getLogger(__name__)

WINDOW = 2
MAX_GROUP_BLOCKS = 512
MAX_GROUP_BYTES = 16 << 20
MIN_POLL_S, MAX_POLL_S = 50e-6, 400e-6
IDLE_S = 0.25
RETRIES = 1


class Link(Protocol):
    """What is needed of a transfer engine; Mooncake's meaning of the numbers."""

    def submit(self, session: str, source: int, target: int, length: int) -> int:
        """Start a write. A handle, or 0 if it was refused."""

    def check(self, handle: int) -> int:
        """0 while it runs, 1 once applied and acknowledged, negative if it failed. After
        anything but 0 the handle is gone and the source is not read any more."""


class MooncakeLink:
    def __init__(self, engine: object) -> None:
        self._engine = engine

    def submit(self, session: str, source: int, target: int, length: int) -> int:
        return int(self._engine.transfer_submit_write(session, source, target, length))  # type: ignore[attr-defined]

    def check(self, handle: int) -> int:
        return int(self._engine.transfer_check_status(handle))  # type: ignore[attr-defined]


@dataclass(eq=False)
class Job:
    """Some pages of one request for one peer, in layers next_layer..end_layer-1.

    `pieces[layer]` are the layer's buffers. `extra` is written with the last group.
    """

    room: int
    session: str
    first_page: int
    parts: Sequence[Run]
    pieces: Sequence[Sequence[Piece]]
    gate: LayerGate
    extra: Sequence[tuple[int, int, int]] = ()
    last: bool = False
    resent: bool = False
    next_layer: int = 0
    end_layer: int = -1
    in_flight: int = 0
    dropped: bool = False

    def __post_init__(self) -> None:
        if self.end_layer < 0:
            self.end_layer = len(self.pieces)

    @property
    def layer_bytes(self) -> int:
        return sum(p.length for p in self.pieces[0]) * self.pages

    @property
    def layer_blocks(self) -> int:
        return sum(piece.count(self.parts) for piece in self.pieces[0])

    @property
    def pages(self) -> int:
        return sum(run.pages for run in self.parts)

    @property
    def submitted(self) -> bool:
        return self.dropped or self.next_layer == self.end_layer


@dataclass(eq=False)
class Part:
    """A range of one job's layers inside a group. `receipt` is what the owner noted at
    submission (its checksums)."""

    job: Job
    first_layer: int
    layers: int
    bytes: int = 0
    receipt: object = None


@dataclass(eq=False)
class Write:
    block: tuple[int, int, int]
    handle: int
    tries: int = 0


@dataclass(eq=False)
class Sending:
    """One group on the wire."""

    parts: list[Part]
    writes: deque[Write]
    bytes: int
    started_s: float
    failed: bool = False
    retries: int = 0


@dataclass
class Peer:
    session: str
    jobs: deque[Job] = field(default_factory=deque)
    window: deque[Sending] = field(default_factory=deque)
    link: LinkModel = field(default_factory=LinkModel)
    last_end_s: float = 0.0


class Owner(Protocol):
    """Who decides about requests; all calls come from the pump's thread."""

    def unwanted(self, room: int) -> bool:
        """Whether a room has failed or was aborted: nothing more is sent for it."""

    def note(self, part: Part) -> object:
        """A part has just been submitted. The result becomes its receipt."""

    def sent(self, sending: "Sending", now_s: float) -> None:
        """A group is off the wire, acknowledged or failed."""

    def arrived(self, part: Part) -> None:
        """A part's bytes were acknowledged by the peer."""

    def ended(self, job: Job) -> None:
        """A job has no write left: all acknowledged, or dropped."""

    def broken(self, job: Job, reason: str, *, by_peer: bool) -> None:
        """A write failed for good, or the forward did. `ended` follows."""

    def idle(self) -> None:
        """Called every IDLE_S or so, for what depends on time."""


class Pump(threading.Thread):
    def __init__(self, link: Link, owner: Owner, sizer: GroupSizer) -> None:
        super().__init__(name="hma-pump", daemon=True)
        self.link = link
        self.owner = owner
        self.sizer = sizer
        self.peers: dict[str, Peer] = {}
        self._incoming: deque[Job] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._poll_s = MIN_POLL_S

    # -- from other threads --

    def put(self, job: Job) -> None:
        self._incoming.append(job)
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    # -- the thread --

    def run(self) -> None:
        idle_s = 0.0
        while not self._stopping:
            try:
                moved = self._step()
                if time.monotonic() - idle_s > IDLE_S:
                    self.owner.idle()
                    idle_s = time.monotonic()
            except Exception:
                # A bug must not silence the pump for all later requests.
                logger.exception("The sending thread failed at one step and goes on")
                time.sleep(0.05)
                moved = True
            if moved:
                self._poll_s = MIN_POLL_S / 2
            else:
                self._pause()

    def _step(self) -> bool:
        moved = False
        while self._incoming:
            job = self._incoming.popleft()
            self.peers.setdefault(job.session, Peer(job.session)).jobs.append(job)
            moved = True
        for peer in list(self.peers.values()):
            moved |= self._reap(peer)
            moved |= self._submit(peer)
            if not peer.jobs and not peer.window and len(self.peers) > 64:
                del self.peers[peer.session]
        return moved

    def _pause(self) -> None:
        """Until something may have changed: writes have to be looked at, gates and jobs wake."""
        polling = any(
            peer.window or any(job.gate.waits_for_device for job in peer.jobs)
            for peer in self.peers.values()
        )
        self._poll_s = min(2 * self._poll_s, MAX_POLL_S) if polling else IDLE_S
        self._wake.wait(self._poll_s)
        self._wake.clear()

    def _submit(self, peer: Peer) -> bool:
        moved = self._drop(peer)
        while len(peer.window) < WINDOW:
            parts = self._collect(peer)
            if not parts:
                break
            self._send(peer, parts)
            moved = True
        while peer.jobs and peer.jobs[0].submitted:
            peer.jobs.popleft()
        return moved

    def _drop(self, peer: Peer) -> bool:
        """Take unwanted jobs and those of broken forwards out of the queue."""
        moved = False
        for job in peer.jobs:
            if job.submitted:
                continue
            if self.owner.unwanted(job.room):
                job.dropped = True
            elif job.gate.error is not None:
                job.dropped = True
                self.owner.broken(job, job.gate.error, by_peer=False)
            else:
                continue
            moved = True
            self._maybe_end(job)
        return moved

    def _collect(self, peer: Peer) -> list[Part]:
        """The next group: ready layers of queued jobs, oldest first."""
        parts: list[Part] = []
        size = count = 0
        for job in peer.jobs:
            if job.submitted:
                continue
            ready = min(job.gate.ready, job.end_layer)
            if ready <= job.next_layer:
                continue
            if peer.window and ready < job.end_layer:
                wanted = self.sizer.layers(peer.link, job.layer_bytes, job.end_layer)
                if ready - job.next_layer < wanted:
                    continue
            layer_bytes, layer_blocks = max(job.layer_bytes, 1), max(job.layer_blocks, 1)
            fits = min(
                (MAX_GROUP_BYTES - size) // layer_bytes, (MAX_GROUP_BLOCKS - count) // layer_blocks
            )
            # One layer always fits an empty group.
            layers = min(ready - job.next_layer, max(fits, 0 if parts else 1))
            if layers <= 0:
                break
            parts.append(Part(job, job.next_layer, layers))
            job.next_layer += layers
            size += layers * layer_bytes
            count += layers * layer_blocks
            if job.next_layer < ready:
                break  # A room's jobs leave in order: nothing overtakes the rest of this one.
        return parts

    def _send(self, peer: Peer, parts: list[Part]) -> None:
        blocks = []
        for part in parts:
            job = part.job
            job.in_flight += 1
            wanted = [
                block
                for layer in range(part.first_layer, part.first_layer + part.layers)
                for piece in job.pieces[layer]
                for block in piece.blocks(job.parts)
            ]
            part.bytes = sum(length for _, _, length in wanted)
            blocks += wanted
            if job.submitted:
                blocks += job.extra
        sending = Sending(
            parts,
            deque(Write(block, 0) for block in blocks),
            sum(length for _, _, length in blocks),
            time.perf_counter(),
        )
        for write in sending.writes:
            write.handle = self.link.submit(peer.session, *write.block)
        peer.window.append(sending)
        for part in parts:
            part.receipt = self.owner.note(part)

    def _reap(self, peer: Peer) -> bool:
        """Finish the oldest groups, in order: a room's last group ends last."""
        moved = False
        while peer.window:
            sending = peer.window[0]
            while sending.writes:
                write = sending.writes[0]
                status = self.link.check(write.handle) if write.handle else -1
                if status == 0:
                    return moved
                if status < 0 and not sending.failed and write.tries < RETRIES:
                    # Writing the same bytes to the same place again is harmless: decode
                    # keeps the pages until this side says that nothing is on its way.
                    write.tries += 1
                    sending.retries += 1
                    write.handle = self.link.submit(peer.session, *write.block)
                    moved = True
                    continue
                sending.failed |= status < 0
                sending.writes.popleft()
                moved = True
            peer.window.popleft()
            self._finish(peer, sending)
        return moved

    def _finish(self, peer: Peer, sending: Sending) -> None:
        now = time.perf_counter()
        if not sending.failed:
            peer.link.observe(sending.bytes, now - max(sending.started_s, peer.last_end_s))
        peer.last_end_s = now
        self.owner.sent(sending, now)
        for part in sending.parts:
            job = part.job
            job.in_flight -= 1
            if sending.failed and not job.dropped:
                job.dropped = True
                self.owner.broken(
                    job, f"a write to decode server {peer.session} failed", by_peer=True
                )
            elif not sending.failed and not self.owner.unwanted(job.room):
                self.owner.arrived(part)
            self._maybe_end(job)

    def _maybe_end(self, job: Job) -> None:
        if job.submitted and job.in_flight == 0:
            self.owner.ended(job)
