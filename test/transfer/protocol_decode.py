"""The decode server of the protocol's simulation, and where late writes are found."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import KVTransferError
from sglang.srt.disaggregation.decode import DecodeRequest

from sglang_hma.transfer import claims as claims_module
from sglang_hma.transfer.decode import routes
from sglang_hma.transfer.decode.manager import HmaDecodeManager
from sglang_hma.transfer.decode.queues import HmaDecodeTransferQueue
from sglang_hma.transfer.decode.route_asker import Found
from sglang_hma.transfer.endpoints import HmaKVReceiver

from .protocol_servers import Request, Server
from .protocol_world import (
    BOOTSTRAP,
    DECODE_IP,
    World,
    Write,
)
from .real_managers import PAGES

STARTING, TRANSFERRING, RUNNING = "starting", "transferring", "running"


class Queue(HmaDecodeTransferQueue):
    """SGLang's queue as sglang-hma extends it; pages and metadata rows are the simulation's."""

    def __init__(self, server: "Decode") -> None:
        self.server = server
        self.queue, self._deferred_releases, self._asked_s = [], [], {}
        self._liveness = SimpleNamespace(is_gone=server.world.is_gone)  # type: ignore[assignment]
        self.gloo_group, self.tp_rank, self.tree_cache = None, 0, SimpleNamespace(unlock=id)
        self.enable_host_receive = self.enable_staging = False
        self.enable_deferred_kv_release, self.deferred_kv_release_timeout = True, 1e9
        self.metadata_buffers = server  # type: ignore[assignment]
        self.req_to_metadata_buffer_idx_allocator = SimpleNamespace(free=server.free_row)
        self.scheduler = SimpleNamespace(
            enable_decode_hicache=False,
            enable_hisparse=False,
            output_streamer=server,
            metrics_reporter=SimpleNamespace(enable_metrics=False),
            recv_from_tokenizer=None,
            tp_size=1,
            running_batch=SimpleNamespace(is_empty=lambda: True),
            disagg_decode_prealloc_queue=SimpleNamespace(kv_manager=server.manager),
            token_to_kv_pool_allocator=None,
        )

    def _poll_with_metadata_gate(self) -> list[int]:
        return [entry.kv_receiver.poll() for entry in self.queue]

    def _release_request(self, decode_req: DecodeRequest) -> None:
        self.server.release(decode_req.req.half)

    def _commit_transfer_to_req(self, decode_req: DecodeRequest) -> None:
        self.server.commit(decode_req.req.half)
        decode_req.kv_receiver.clear()


class Decode(Server):
    ip, role, kind = DECODE_IP, "decode", HmaDecodeManager
    manager: HmaDecodeManager

    def __init__(self, world: World) -> None:
        super().__init__(world)
        manager = self.manager
        manager.quarantine._read = lambda: world.rows(DECODE_IP)
        manager._asker = SimpleNamespace(look=self.look)  # type: ignore[assignment]
        manager._heartbeat_shutdown = self.beat = Beat()
        # SGLang forgets the session of a server that is lost, and makes another.
        manager.session_pool = defaultdict(lambda: SimpleNamespace(get=self.ask_health))
        self.heartbeat_loop = manager._worker_threads[1].target
        self.queue = Queue(self)
        self.waiting: list[DecodeHalf] = []
        self.running: list[DecodeHalf] = []
        self.owners: dict[int, DecodeHalf] = {}

    def look(self, address: str) -> Found | None:
        answer = routes.fetch(address)
        rank = routes.fetch(address, (0, 0, 0, 0))
        return Found(answer, {(0, 0, 0, 0): rank.route}) if answer and rank else None

    def ask_health(self, *_: Any, **__: Any) -> Any:
        if routes.fetch(BOOTSTRAP) is None:
            raise OSError("no route")
        return SimpleNamespace(status_code=200)

    def start(self, request: Request) -> None:
        self.waiting.append(DecodeHalf(self, request))
        request.waits.add("decode")

    def turn(self) -> None:
        for half in list(self.waiting):
            half.turn()
        self.queue.pop_transferred()
        self.queue.resolve_deferred_releases()

    def tick(self) -> None:
        renewer = self.manager._claim_renewer
        now = self.world.clock.now_s
        if renewer._thread is not None and now - self.beat.renewed_s >= claims_module.RENEW_S:
            self.beat.renewed_s = now
            renewer._renew_all()
        if now - self.beat.beat_s >= self.manager.heartbeat_interval:
            self.beat.beat_s, self.beat.beats = now, 1
            self.heartbeat_loop()

    # -- pages --

    def store(self, write: Write) -> None:
        """A write lands."""
        pages, touched = self.touched(write)
        owners = [self.owners.get(page) for page in touched] if pages else []
        late = [page for page in owners if page is None or page.state != TRANSFERRING]
        self.world.check(
            not late, f"a write lands in free pages, or in pages that are read: {touched}"
        )
        self.memory_at(write.target, write.length)[:] = write.data

    def assert_untouched(self, half: "DecodeHalf") -> None:
        """No write to the pages of a request may land any more, nor to its metadata row."""
        for write in self.world.writes:
            if write.to is self:
                pages, touched = self.touched(write)
                mine = set(half.all_pages) if pages else {half.row}
                self.world.check(
                    not touched & mine,
                    f"room {half.request.room} lets go of {touched & mine} while a write is "
                    f"{write.stage.name.lower()}",
                )

    def commit(self, half: "DecodeHalf") -> None:
        """The scheduler reads the pages from now on."""
        request = half.request
        assert np.array_equal(self.memory.pages.numpy()[:, half.pages], request.sent)
        assert np.array_equal(self.memory.window.numpy()[:, half.window], request.sent_window)
        assert np.array_equal(self.memory.rows.numpy()[:, half.row], request.sent_rows)
        self.assert_untouched(half)
        half.state = RUNNING
        self.running.append(half)
        request.end("decode", "succeeded")

    def finish(self, half: "DecodeHalf") -> None:
        """A request has generated all its tokens."""
        assert np.array_equal(self.memory.pages.numpy()[:, half.pages], half.request.sent)
        assert np.array_equal(self.memory.window.numpy()[:, half.window], half.request.sent_window)
        self.running.remove(half)
        self.release(half)

    def release(self, half: "DecodeHalf") -> None:
        self.assert_untouched(half)
        for page in half.all_pages:
            del self.owners[page]
        self.free_pages += half.pages
        self.free_windows += half.window

    def free_row(self, row: int) -> None:
        self.free_rows.append(row)

    def clear_slot(self, row: int) -> None:
        self.memory.rows[:, row] = 0

    def stream_output(self, ended: list[Any], *_: Any) -> None:
        for req in ended:
            req.half.request.end("decode", "failed")


class Beat:
    """Stands for the event that ends the heartbeat's loop: lets it go round once."""

    beats = 0
    beat_s = renewed_s = 0.0

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        self.beats -= 1
        return self.beats < 0


class DecodeHalf:
    """A request on decode, from its arrival until it has its pages."""

    def __init__(self, server: Decode, request: Request) -> None:
        self.server, self.request = server, request
        self.end = HmaKVReceiver(server.manager, BOOTSTRAP, request.room)
        self.state, self.pages, self.row = STARTING, list[int](), -1
        self.window: list[int] = []
        self.told = False
        self.since_s = server.world.clock.now_s

    def turn(self) -> None:
        manager, server = self.server.manager, self.server
        poll = self.end.poll()
        if poll == KVPoll.Failed:
            with pytest.raises(KVTransferError):
                self.end.failure_exception()
            self.end.clear()
            server.waiting.remove(self)
            self.request.end("decode", "failed")
        elif not self.told:
            if manager.try_ensure_parallel_info(BOOTSTRAP):
                self.told = True
                self.end.init(0)
            elif server.world.clock.now_s - self.since_s > 20:
                self.end.abort()
        elif poll == KVPoll.WaitingForInput:
            self.reserve()

    @property
    def all_pages(self) -> list[int]:
        """As Server.touched numbers them."""
        return self.pages + [PAGES + page for page in self.window]

    def reserve(self) -> None:
        server = self.server
        seen = self.request.seen * server.memory.windowed
        if len(server.free_pages) < self.request.pages or not server.free_rows:
            return
        if len(server.free_windows) < seen:
            return
        self.pages = [server.free_pages.pop(0) for _ in range(self.request.pages)]
        self.window = [server.free_windows.pop(0) for _ in range(seen)]
        self.row, self.state = server.free_rows.pop(0), TRANSFERRING
        server.owners |= dict.fromkeys(self.all_pages, self)
        server.waiting.remove(self)
        kinds = [np.array(self.window, dtype=np.int32)] if server.memory.windowed else []
        self.end.send_metadata(np.array(self.pages, dtype=np.int32), self.row, kinds)
        req = SimpleNamespace(
            half=self,
            rid=str(self.request.room),
            bootstrap_room=self.request.room,
            return_logprob=False,
            finished_reason=None,
            origin_input_ids=[0] * 32 * self.request.pages,
        )
        entry = DecodeRequest(req=req, kv_receiver=self.end, metadata_buffer_index=self.row)
        server.queue.queue.append(entry)

    def abort(self) -> None:
        self.end.abort()
