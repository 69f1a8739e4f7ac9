"""The prefill server's send thread: layers leave as they become final.

One thread serves all peers. It submits writes and polls them. It never waits inside Mooncake,
which would spin on a core that the forward pass needs. Each peer has at most WINDOW groups on the
wire, and the next one is collected meanwhile: so groups grow on a slow link, and a peer that does
not answer delays no other.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from sglang_hma.transfer.messages import Landed
from sglang_hma.transfer.prefill.jobs import Group, Job, LayerRange, Write
from sglang_hma.transfer.prefill.link import Link
from sglang_hma.transfer.prefill.link_model import GroupSizer, LinkModel

logger = logging.getLogger(__name__)

WINDOW = 2
MAX_GROUP_BLOCKS = 512
MAX_GROUP_BYTES = 16 << 20
MIN_POLL_S, MAX_POLL_S = 50e-6, 400e-6
TICK_S = 0.25
RETRIES = 1
KEPT_PEERS = 64  # idle peers beyond these are forgotten, with what was learnt about their links


@dataclass
class Peer:
    session: str
    jobs: deque[Job] = field(default_factory=deque)
    window: deque[Group] = field(default_factory=deque)
    link_model: LinkModel = field(default_factory=LinkModel)
    last_end_s: float = 0.0


class SendListener(Protocol):
    """Who decides about requests. All calls come from the send thread."""

    def is_cancelled(self, room: int) -> bool:
        """Whether a room has failed or was aborted: nothing more is sent for it."""

    def on_submitted(self, layers: LayerRange) -> Landed | None:
        """A range's writes have just been submitted. The result becomes its announcement."""

    def on_group_done(self, group: Group, now_s: float) -> None:
        """Every write of a group has been acknowledged or has failed."""

    def on_acked(self, layers: LayerRange) -> None:
        """The peer has acknowledged a range's bytes."""

    def on_failed(self, job: Job, reason: str, *, by_peer: bool) -> None:
        """A write has failed for good, or the forward pass has (`by_peer` False). `on_done`
        follows."""

    def on_done(self, job: Job) -> None:
        """A job has no write left: all are acknowledged, or it was dropped."""

    def on_tick(self) -> None:
        """Called about every TICK_S, for what depends on time."""


class SendThread(threading.Thread):
    def __init__(self, link: Link, listener: SendListener, sizer: GroupSizer) -> None:
        super().__init__(name="hma-send", daemon=True)
        self.link = link
        self.listener = listener
        self.sizer = sizer
        self.peers: dict[str, Peer] = {}
        self._incoming: deque[Job] = deque()
        self._wake = threading.Event()
        self._poll_s = MIN_POLL_S

    # -- from other threads --

    def put(self, job: Job) -> None:
        self._incoming.append(job)
        self._wake.set()

    def wake(self) -> None:
        """A gate has grown or ended."""
        self._wake.set()

    # -- the thread --

    def run(self) -> None:
        ticked_s = 0.0
        while True:
            try:
                progressed = self.step()
                if time.monotonic() - ticked_s > TICK_S:
                    self.listener.on_tick()
                    ticked_s = time.monotonic()
            except Exception:
                # An error must not stop the sending of all later requests.
                logger.exception("The send thread failed at one step and goes on")
                time.sleep(0.05)
                progressed = True
            if progressed:
                self._poll_s = MIN_POLL_S / 2
            else:
                self._pause()

    def step(self) -> bool:
        """Finish and submit what can be, without waiting. Whether anything was done."""
        progressed = False
        while self._incoming:
            job = self._incoming.popleft()
            self.peers.setdefault(job.session, Peer(job.session)).jobs.append(job)
            progressed = True
        for peer in list(self.peers.values()):
            progressed |= self._finish_groups(peer)
            progressed |= self._submit_groups(peer)
            if not peer.jobs and not peer.window and len(self.peers) > KEPT_PEERS:
                del self.peers[peer.session]
        return progressed

    def _pause(self) -> None:
        """Until there may be something to do. Gates and new jobs wake; writes and device events
        must be polled."""
        polling = any(
            peer.window or any(job.gate.waits_for_device for job in peer.jobs)
            for peer in self.peers.values()
        )
        self._poll_s = min(2 * self._poll_s, MAX_POLL_S) if polling else TICK_S
        self._wake.wait(self._poll_s)
        self._wake.clear()

    # -- submitting --

    def _submit_groups(self, peer: Peer) -> bool:
        progressed = self._drop_cancelled(peer)
        while len(peer.window) < WINDOW:
            ranges = self._collect(peer)
            if not ranges:
                break
            self._submit(peer, ranges)
            progressed = True
        while peer.jobs and peer.jobs[0].submitted:
            peer.jobs.popleft()
        return progressed

    def _drop_cancelled(self, peer: Peer) -> bool:
        """Drop jobs of cancelled rooms and of forward passes that have failed."""
        progressed = False
        for job in peer.jobs:
            if job.submitted:
                continue
            if self.listener.is_cancelled(job.room):
                job.dropped = True
            elif job.gate.error is not None:
                job.dropped = True
                self.listener.on_failed(job, job.gate.error, by_peer=False)
            else:
                continue
            progressed = True
            self._maybe_done(job)
        return progressed

    def _collect(self, peer: Peer) -> list[LayerRange]:
        """The next group: ready layers of queued jobs, oldest first."""
        ranges: list[LayerRange] = []
        size = count = 0
        for job in peer.jobs:
            if job.submitted:
                continue
            ready = min(job.gate.ready, job.end_layer)
            if ready <= job.next_layer:
                continue
            if peer.window and ready < job.end_layer:
                enough = self.sizer.layers(peer.link_model, job.layer_bytes, job.end_layer)
                if ready - job.next_layer < enough:
                    continue
            layer_bytes, layer_blocks = max(job.layer_bytes, 1), max(job.layer_blocks, 1)
            fits = min(
                (MAX_GROUP_BYTES - size) // layer_bytes, (MAX_GROUP_BLOCKS - count) // layer_blocks
            )
            # One layer always fits an empty group.
            layers = min(ready - job.next_layer, max(fits, 0 if ranges else 1))
            if layers <= 0:
                break
            ranges.append(LayerRange(job, job.next_layer, layers))
            job.next_layer += layers
            size += layers * layer_bytes
            count += layers * layer_blocks
            if job.next_layer < ready:
                break  # A room's jobs leave in order: nothing overtakes the rest of this one.
        return ranges

    def _submit(self, peer: Peer, ranges: list[LayerRange]) -> None:
        writes: deque[Write] = deque()
        for layers in ranges:
            job = layers.job
            job.in_flight += 1
            blocks = layers.blocks()
            if job.submitted:
                blocks += job.metadata
            writes.extend(Write(block, 0) for block in blocks)
        size = sum(write.block[2] for write in writes)
        group = Group(ranges, writes, size, time.perf_counter())
        for write in writes:
            write.handle = self.link.submit(peer.session, *write.block)
        peer.window.append(group)
        for layers in ranges:
            layers.announcement = self.listener.on_submitted(layers)

    # -- finishing --

    def _finish_groups(self, peer: Peer) -> bool:
        """Finish groups in the order of their submission, so that a room's last one ends last."""
        progressed = False
        while peer.window:
            group = peer.window[0]
            while group.writes:
                write = group.writes[0]
                status = self.link.check(write.handle) if write.handle else -1
                if status == 0:
                    return progressed
                progressed = True
                if status < 0 and not group.failed and write.tries < RETRIES:
                    # Writing the same bytes to the same place again is harmless: decode
                    # keeps the pages until this side confirms that nothing is on its way.
                    write.tries += 1
                    group.retries += 1
                    write.handle = self.link.submit(peer.session, *write.block)
                    continue
                group.failed |= status < 0
                group.writes.popleft()
            peer.window.popleft()
            self._finish(peer, group)
        return progressed

    def _finish(self, peer: Peer, group: Group) -> None:
        now = time.perf_counter()
        if not group.failed:
            peer.link_model.observe(group.bytes, now - max(group.started_s, peer.last_end_s))
        peer.last_end_s = now
        self.listener.on_group_done(group, now)
        for layers in group.ranges:
            job = layers.job
            job.in_flight -= 1
            if group.failed and not job.dropped:
                job.dropped = True
                reason = f"a write to decode server {peer.session} failed"
                self.listener.on_failed(job, reason, by_peer=True)
            elif not group.failed and not self.listener.is_cancelled(job.room):
                self.listener.on_acked(layers)
            self._maybe_done(job)

    def _maybe_done(self, job: Job) -> None:
        if job.submitted and job.in_flight == 0:
            self.listener.on_done(job)
