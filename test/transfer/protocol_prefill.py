"""The prefill server of the protocol's simulation."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import KVTransferError

from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.decode import routes
from sglang_hma.transfer.endpoints import HmaKVSender
from sglang_hma.transfer.prefill.jobs import EarlySend
from sglang_hma.transfer.prefill.manager import HmaPrefillManager

from .protocol_servers import LAYERS, Request, Server
from .protocol_world import (
    BOOTSTRAP,
    PREFILL_IP,
    Later,
    World,
)


class Prefill(Server):
    ip, role, kind = PREFILL_IP, "prefill", HmaPrefillManager
    manager: HmaPrefillManager

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.boot = self.session
        self.sender = self.manager.sender
        assert self.sender is not None
        self.hashing = self.sender._hashing = Later()
        self.sender.claims._liveness = SimpleNamespace(is_gone=world.is_gone)
        gone = self.manager.intake.registrations
        gone._refuses_connections = world.is_gone
        self.halves: list[PrefillHalf] = []
        self.held: dict[int, int] = {}  # page -> how often
        self.limbo: list[int] = []  # freed while they are held

    def answer(self, place: routes.Place) -> routes.Answer:
        if place != routes.SERVER:
            rank = {"rank_ip": self.ip, "rank_port": self.address[1]}
            return routes.Answer(rank, self.boot)
        route = {
            **dict.fromkeys(("attn_tp_size", "attn_cp_size", "dp_size", "pp_size"), 1),
            "page_size": 32,
            "kv_cache_dtype": "auto",
            "follow_bootstrap_room": True,
            "kv_layout": str(self.memory.format),
        }
        return routes.Answer(route, self.boot)

    def start(self, request: Request) -> None:
        self.halves.append(PrefillHalf(self, request))
        request.waits.add("prefill")

    def free(self, pages: list[int]) -> None:
        """A page that a transfer holds is not given out before that has ended."""
        self.free_pages += [page for page in pages if not self.held.get(page)]
        self.limbo = [*self.limbo, *(page for page in pages if self.held.get(page))]

    def hold(self, pages: Any) -> Any:
        for page in pages.tolist():
            self.held[page] = self.held.get(page, 0) + 1

        def let_go() -> None:
            for page in pages.tolist():
                self.held[page] -= 1
                if not self.held[page]:
                    del self.held[page]
                    if page in self.limbo:
                        self.limbo.remove(page)
                        self.free_pages.append(page)

        return let_go

    def turn(self) -> None:
        for half in list(self.halves):
            half.turn()

    def tick(self) -> None:
        assert self.sender is not None
        self.sender.thread.step()
        self.sender.on_tick()
        self.manager._run_one_probe_pass()


class PrefillHalf:
    """A request on prefill, from its arrival until the scheduler has answered it."""

    def __init__(self, server: Prefill, request: Request) -> None:
        self.server, self.request = server, request
        self.end = HmaKVSender(server.manager, BOOTSTRAP, request.room)
        self.pages: list[int] = []
        self.window: list[int] = []
        self.row = -1
        self.passes: list[slice] = []  # to come, the last one first
        self.gate: LayerGate | None = None
        self.computed = self.begun = False
        self.next_layer = 0

    def turn(self) -> None:
        if self.gate is not None:
            return
        poll = self.end.poll()
        if poll == KVPoll.Failed:
            with pytest.raises(KVTransferError):
                self.end.failure_exception()
            self.conclude("failed")
        elif poll == KVPoll.Success:
            self.end.clear()
            self.conclude("succeeded")
        elif poll == KVPoll.WaitingForInput and not self.begun:
            self.begin()
        elif self.passes and self.begun:
            self.forward()

    def begin(self) -> None:
        wanted, server = self.request.pages, self.server
        seen = self.request.seen * self.server.memory.windowed
        if len(server.free_pages) < wanted or not server.free_rows:
            return
        if len(server.free_windows) < seen:
            return
        self.pages = [server.free_pages.pop(0) for _ in range(wanted)]
        self.window = [server.free_windows.pop(0) for _ in range(seen)]
        self.row, self.begun = server.free_rows.pop(0), True
        self.end.init(wanted, self.row)
        cut = min(self.request.chunk, wanted)
        self.passes = [
            each for each in (slice(cut, wanted), slice(0, cut)) if each.start < each.stop
        ]
        self.forward()

    def forward(self) -> None:
        """A pass begins: whole pages of its chunk leave before it has ended."""
        assert self.server.sender is not None
        part = self.passes.pop()
        gate = self.gate = LayerGate(LAYERS, self.server.sender.thread.wake)
        self.part, self.next_layer = part, 0
        whole = part.stop - (self.request.part_full and not self.passes)
        if whole > part.start:
            ids = np.array(self.pages[part.start : whole], dtype=np.int32)
            early = EarlySend(gate, gate)
            self.end.send_early(early, lambda: self.end.send(ids), hold=self.server.hold)

    def layer(self) -> None:
        """The pass stores one more layer, or ends."""
        assert self.gate is not None
        pages = self.server.memory.pages.numpy()
        if self.next_layer < LAYERS:
            ids = self.pages[self.part]
            for buffer in (self.next_layer, LAYERS + self.next_layer):
                pages[buffer, ids] = np.random.default_rng().integers(
                    0, 256, pages[buffer, ids].shape, dtype=np.uint8
                )
            self.gate.advance(self.next_layer)
            self.next_layer += 1
            return
        self.gate.finish()
        self.gate = None
        if not self.passes:
            rows = self.server.memory.rows.numpy()
            rows[:, self.row] = np.random.default_rng().integers(0, 256, rows[:, 0].shape)
            self.request.sent = pages[:, self.pages].copy()
            self.request.sent_rows = rows[:, self.row].copy()
            window = self.server.memory.window.numpy()
            window[:, self.window] = np.random.default_rng().integers(
                0, 256, window[:, self.window].shape, dtype=np.uint8
            )
            self.request.sent_window = window[:, self.window].copy()
            tail = self.pages[-1:] if self.request.part_full else []
            kinds = [np.array(self.window)] if self.server.memory.windowed else []
            self.end.send(np.array(tail, dtype=np.int32), kinds)
            self.computed = True

    def fail_forward(self) -> None:
        assert self.gate is not None
        self.gate.fail("the forward pass failed: out of memory")
        self.gate, self.passes = None, []
        self.end.abort()

    def abort(self) -> None:
        """A client has gone away. A request that waits for its pass is dropped at once."""
        self.end.abort()
        if self.begun and not self.computed and self.gate is None:
            self.conclude("failed")

    def conclude(self, outcome: str) -> None:
        self.server.halves.remove(self)
        self.server.free(self.pages)
        self.server.free_windows += self.window
        if self.row >= 0:
            self.server.free_rows.append(self.row)
        self.request.end("prefill", outcome)
