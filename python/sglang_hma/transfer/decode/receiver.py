"""Decode's requests while their pages arrive: verified before the scheduler may read them."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.disaggregation.base import KVPoll

from sglang_hma.transfer import messages
from sglang_hma.transfer.integrity import (
    Buffers,
    CorruptPages,
    HostMemory,
    Verifier,
    new_generation,
)
from sglang_hma.transfer.metrics import DecodeMetrics
from sglang_hma.transfer.page_slices import Pages

logger = logging.getLogger(__name__)


@dataclass
class Sender:
    """The prefill ranks that a room's pages come from: (ip, port) of their control sockets.

    Each fills one part of every page; rank k of them the k-th."""

    ranks: list[tuple[str, int]]
    done: list[int] = field(default_factory=list)  # ranks whose Success waits for verification


class Inbox:
    def __init__(self, manager: Any, memory: HostMemory) -> None:
        self.manager = manager
        self.verifier = Verifier(
            Buffers(tuple(manager.kv_args.kv_data_ptrs), tuple(manager.kv_args.kv_item_lens)),
            memory,
        )
        self.senders: dict[int, Sender] = {}
        self.metrics = DecodeMetrics()
        self._lock = threading.Lock()

    # -- the scheduler's thread --

    def expect(self, room: int, pages: Pages, bootstrap_infos: Sequence[dict[str, Any]]) -> None:
        """Before the pages are published: from now on groups for this room are compared."""
        ranks = [(str(info["rank_ip"]), int(info["rank_port"])) for info in bootstrap_infos]
        with self._lock:
            self.senders[room] = Sender(ranks)
            self.verifier.expect(room, new_generation(), pages, len(ranks))

    def generation(self, room: int) -> int | None:
        arrival = self.verifier.arrivals.get(room)
        return arrival.generation if arrival is not None else None

    def forget(self, room: int) -> None:
        with self._lock:
            self.senders.pop(room, None)
            self.verifier.forget(room)

    # -- the thread that hears from prefill --

    def on_group(self, group: messages.Group) -> None:
        began = time.thread_time()
        sender = self.senders.get(group.room)
        if sender is None:
            return
        try:
            resend = self.verifier.compare(group, self.manager.get_session_id())
        except CorruptPages as error:
            self.metrics.mismatches.inc()
            logger.error("Room %s: %s", group.room, error)
            self.manager.record_failure(group.room, str(error))
            self.manager.update_status(group.room, KVPoll.Failed)
            return
        self.metrics.groups.inc()
        self.metrics.verify_seconds.inc(time.thread_time() - began)
        if resend is not None:
            self.metrics.mismatches.inc()
            address = sender.ranks[group.rank % len(sender.ranks)]
            self.manager.send_frames(*address, messages.frames(resend))
        elif sender.done:
            self._release(group.room, sender)

    def holds_back(self, room: int, rank: int) -> bool:
        """Prefill reports success: whether that has to wait for pages still to be verified."""
        sender = self.senders.get(room)
        if sender is None:
            return False
        if not self.verifier.complete(room):
            sender.done.append(rank)
            return True
        self._confirm(room, sender)
        return False

    def _release(self, room: int, sender: Sender) -> None:
        if not self.verifier.complete(room):
            return
        self._confirm(room, sender)
        ranks, sender.done = sender.done, []
        for rank in ranks:
            self.manager.commit_success(room, rank)

    def _confirm(self, room: int, sender: Sender) -> None:
        generation = self.generation(room)
        if generation is None:
            return
        message = messages.Verified(
            room=room, generation=generation, session=self.manager.get_session_id()
        )
        for address in sender.ranks:
            self.manager.send_frames(*address, messages.frames(message))
