"""The prefill server's send thread: layers leave as they become final.

One thread serves all peers. It submits writes and polls them. It never waits inside Mooncake,
which would spin on a core that the forward pass needs. Each peer has at most WINDOW groups on the
wire, and the next one is collected meanwhile: so groups grow on a slow link, and a peer that does
not answer delays no other.

A write that has failed is not tried again: bytes of the first try may land at any time as long as
the kernel holds them, also after decode has verified a second one (drain.py).
"""

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Protocol

from sglang_hma.transfer.messages import Landed
from sglang_hma.transfer.page_slices import Block
from sglang_hma.transfer.prefill.jobs import Group, Job, LayerRange
from sglang_hma.transfer.prefill.link import Link
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.peer import Peer

logger = logging.getLogger(__name__)

WINDOW = 2
MAX_GROUP_BLOCKS = 512
MAX_GROUP_BYTES = 16 << 20
# Mooncake's queue for a peer takes 2,052 writes; some of those beyond never end.
MAX_WRITES = 1024
# Mooncake ends a write after a minute (MC_TRANSFER_TIMEOUT).
STUCK_S = 90.0
SLOW_S = 10.0  # a peer without the end of any write for so long is one to look at
MIN_POLL_S, MAX_POLL_S = 50e-6, 400e-6
TICK_S = 0.25
KEPT_PEERS = 64  # idle peers beyond these are forgotten, with what was learnt about their links


class SendListener(Protocol):
    """Who decides about requests. All calls come from the send thread."""

    def is_cancelled(self, room: int) -> bool:
        """Whether a room has failed or was aborted: nothing more is sent for it."""

    def on_submitted(self, layers: LayerRange) -> "Future[Landed] | None":
        """A range's writes are being submitted. The result becomes its announcement."""

    def on_group_done(self, group: Group, now_s: float) -> None:
        """Every write of a group has been acknowledged or has failed. Comes before all that
        follows from it for jobs."""

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
        self._changed = False  # a gate, since all jobs were looked at
        self._looked_s = 0.0
        self._poll_s = MIN_POLL_S

    # -- from other threads --

    def put(self, job: Job) -> None:
        self._incoming.append(job)
        self._wake.set()

    def wake(self) -> None:
        """A gate has grown or ended."""
        self._changed = True
        self._wake.set()

    def oldest_write_s(self) -> float:
        """Age of the oldest group on the wire, 0 without one."""
        began = [group.started_s for peer in list(self.peers.values()) for group in peer.on_wire()]
        return time.perf_counter() - min(began) if began else 0.0

    def stuck_peers(self) -> int:
        """Peers to which writes are on their way and none has ended for SLOW_S."""
        late_s = time.monotonic() - SLOW_S
        peers = list(self.peers.values())
        return sum(bool(peer.on_wire()) and peer.progress_s < late_s for peer in peers)

    # -- the thread --

    def run(self) -> None:
        ticked_s = 0.0
        while True:
            try:
                progressed = self.step(look=self._must_look())
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

    def _must_look(self) -> bool:
        """Whether jobs may be ready, or cancelled, that were not when all were looked at."""
        now, changed = time.monotonic(), self._changed
        if not (changed or now - self._looked_s > TICK_S or self._waits_for_device()):
            return False
        self._changed, self._looked_s = False, now
        return True

    def step(self, *, look: bool = True) -> bool:
        """Finish and submit what can be, without waiting. Whether anything was done. Jobs are
        looked at where there are new ones or a group has ended, and everywhere with `look`."""
        progressed = False
        fresh = set()
        while self._incoming:
            job = self._incoming.popleft()
            self.peers.setdefault(job.session, Peer(job.session)).jobs.append(job)
            fresh.add(job.session)
            progressed = True
        for peer in list(self.peers.values()):
            ended = self._finish_groups(peer)
            if ended or look or peer.session in fresh:
                progressed |= ended | self._submit_groups(peer)
            if peer.idle and len(self.peers) > KEPT_PEERS:
                del self.peers[peer.session]
        return progressed

    def _waits_for_device(self) -> bool:
        return any(job.gate.waits_for_device for peer in self.peers.values() for job in peer.jobs)

    def _pause(self) -> None:
        """Until there may be something to do. Gates and new jobs wake; writes and device events
        must be polled."""
        polling = any(peer.window for peer in self.peers.values()) or self._waits_for_device()
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
        return self._submit_writes(peer) or progressed

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
            if layers <= 0 or (job.attempt and ranges and layers < ready - job.next_layer):
                break  # What is sent again is announced as it was before: in one piece.
            ranges.append(LayerRange(job, job.next_layer, layers))
            job.next_layer += layers
            size += layers * layer_bytes
            count += layers * layer_blocks
            if job.next_layer < ready:
                break  # A room's jobs leave in order: nothing overtakes the rest of this one.
        return ranges

    def _submit(self, peer: Peer, ranges: list[LayerRange]) -> None:
        blocks: deque[Block] = deque()
        for layers in ranges:
            job = layers.job
            job.in_flight += 1
            blocks += layers.blocks()
            if job.submitted:
                blocks += job.metadata
        if not peer.window:
            peer.progress_s = time.monotonic()
        size = sum(length for _, _, length in blocks)
        peer.window.append(Group(ranges, blocks, size, time.perf_counter()))
        self._submit_writes(peer)
        for layers in ranges:
            layers.announcement = self.listener.on_submitted(layers)

    def _submit_writes(self, peer: Peer) -> bool:
        """Of the groups on the wire, as many as the peer's queue takes. Whether there were any."""
        before = peer.writes
        for group in peer.window:
            while group.blocks and peer.writes < MAX_WRITES and not group.failed:
                group.handles.append(self._write(peer, group.blocks.popleft()))
                peer.writes += 1
        return peer.writes > before

    def _write(self, peer: Peer, block: Block) -> int:
        """A handle; 0 if the write was refused."""
        try:
            return self.link.submit(peer.session, *block)
        except Exception:  # an address that is no address
            logger.exception("A write of %d bytes to %s was not possible", block[2], peer.session)
            return 0

    # -- finishing --

    def _finish_groups(self, peer: Peer) -> bool:
        """Finish groups in the order of their submission, so that a room's last one ends last."""
        ended = False
        for group in [each for each in peer.stuck if self._poll(peer, each)]:
            peer.stuck.remove(group)
            self._finish(peer, group)
            ended = True
        while peer.window and self._poll(peer, peer.window[0]):
            self._finish(peer, peer.window.popleft())
            ended = True
        if peer.window and time.monotonic() - peer.progress_s > STUCK_S:
            self._give_up(peer)
            ended = True
        return ended

    def _poll(self, peer: Peer, group: Group) -> bool:
        """Whether every write of a group has ended. Of a failed one no more are submitted."""
        while True:
            while group.handles:
                status = self.link.check(group.handles[0]) if group.handles[0] else -1
                if status == 0:
                    return False
                group.handles.popleft()
                peer.writes -= 1
                peer.progress_s = time.monotonic()
                if status < 0:
                    group.failed = True
                    group.blocks.clear()
            if not group.blocks:
                return True
            if not self._submit_writes(peer):
                return False

    def _give_up(self, peer: Peer) -> None:
        """Nothing has ended for STUCK_S: fail what is on the wire and what is queued. Writes that
        have not ended still count, and keep their rooms from being drained."""
        stuck, peer.window = list(peer.window), deque()
        peer.stuck += stuck
        reason = f"writes to decode server {peer.session} have not ended for {STUCK_S:g} s"
        for group in stuck:
            group.failed = True
            group.blocks.clear()
        jobs = [layers.job for group in stuck for layers in group.ranges]
        for job in [*jobs, *peer.jobs]:
            if not (job.dropped or job.done):
                job.dropped = True
                self.listener.on_failed(job, reason, by_peer=True)
                self._maybe_done(job)

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
        if job.done:
            self.listener.on_done(job)
