"""What the two servers of the protocol's simulation have in common, and a request of theirs.

Managers, senders, receivers and queues are the real ones. Of a scheduler there is as much as starts
requests, computes layers and gives pages out. What must hold of pages is checked where they change
hands.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.common import conn as common_conn
from sglang.srt.disaggregation.mooncake import conn as mooncake_conn
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_server_args

from sglang_hma.config import HmaConfig
from sglang_hma.transfer import manager as manager_module
from sglang_hma.transfer.decode import manager as decode_manager

from .protocol_world import (
    Drained,
    Inbox,
    World,
    Write,
)
from .real_managers import FORMAT, PAGES, ROWS, WINDOW_PAGES, Memory

LAYERS = FORMAT.layers


@dataclass(eq=False)
class Request:
    """`sent` is what prefill computed: [buffers, pages, bytes], of its last window as well, and its
    metadata rows. An outcome is None as long as there is none, and on a side that has died or never
    got its half."""

    room: int
    pages: int
    chunk: int  # pages of the first forward pass
    part_full: bool  # whether the last page waits for the last send
    sent: Any = None
    sent_window: Any = None
    sent_rows: Any = None
    waits: set[str] = field(default_factory=set)
    outcomes: dict[str, str] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Pages of its last window."""
        return min(self.pages, 2)

    def end(self, side: str, outcome: str) -> None:
        assert side not in self.outcomes, f"room {self.room} ended twice on {side}"
        self.outcomes[side] = outcome
        self.waits.remove(side)


class Server:
    """One process. `manager` is the real one; its threads are parked."""

    ip: str
    role: str
    kind: type[Any]

    def __init__(self, world: World) -> None:
        self.world, self.alive = world, True
        self.memory = Memory(windowed=world.windowed)
        self.registration_lost = False
        number = next(world.numbers)
        self.address, self.rpc_port = (self.ip, 5000 + number), 15000 + number
        self.session = f"{self.ip}:{self.rpc_port}"
        self.inbox = Inbox()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in HmaConfig(role=self.role, device="cpu").environment().items():
                patch.setenv(name, value)
            patch.setattr(common_conn, "get_local_ip_auto", lambda: self.ip)
            socket = self.address[1], self.inbox
            patch.setattr(common_conn, "get_zmq_socket_on_host", lambda *_, **__: socket)
            patch.setattr(mooncake_conn, "get_mooncake_transfer_engine", lambda: self)
            outbox = SimpleNamespace(count_waiting=_none, count_lost=_none)
            patch.setattr(manager_module, "Outbox", outbox)
            patch.setattr(self.kind, "outbox", self)
            patch.setattr(decode_manager, "own_ports", lambda *_: {self.rpc_port})
            mode, arguments = DisaggregationMode(self.role), get_server_args()
            self.manager = self.kind(self.memory.kv_args(), mode, arguments, False)
            vars(self.manager)["outbox"] = self
        self.receive_loop = self.manager._worker_threads[0].target
        self.free_pages, self.free_rows = list(range(PAGES)), list(range(ROWS))
        self.free_windows = list(range(1, WINDOW_PAGES))
        world.servers[self.address] = world.by_session[self.session] = self

    @property
    def is_prefill(self) -> bool:
        return self.role == "prefill"

    # -- stands for the outbox and for Mooncake's engine --

    engine = property(lambda self: self)

    def put(self, endpoint: str, frames: list[bytes], *, kept: bool = False) -> bool:
        self.world.put(self, endpoint, frames)
        return True

    def get_session_id(self) -> str:
        return self.session

    def batch_register(self, starts: list[int], sizes: list[int]) -> None:
        """All memory may be written to."""

    def transfer_submit_write(self, session: str, source: int, target: int, length: int) -> int:
        return self.world.submit(self, session, source, target, length)

    def transfer_check_status(self, handle: int) -> int:
        return self.world.status(handle)

    def send_probe(self, session: str) -> int:
        return 0 if self.world.by_session[session].alive and not self.world.cut else -1

    # --

    def receive(self, frames: list[bytes]) -> None:
        self.inbox.waiting.append(frames)
        try:
            self.receive_loop()
        except Drained:
            return
        raise AssertionError("the thread that receives messages has ended")

    def place(self, address: int) -> tuple[Any, int, int]:
        """The array that an address lies in, which of its buffers, and which page or row."""
        for tensor in (self.memory.pages, self.memory.window, self.memory.rows):
            data = tensor.numpy()
            at = address - tensor.data_ptr()
            if 0 <= at < data.nbytes:
                buffer, rest = divmod(at, data[0].nbytes)
                return data, buffer, rest // data[0, 0].nbytes
        raise AssertionError("an address outside of all registered memory")

    def memory_at(self, address: int, length: int) -> Any:
        data, _, _ = self.place(address)
        start = address - int(data.ctypes.data)
        return data.reshape(-1)[start : start + length]

    def touched(self, write: Write) -> tuple[bool, set[int]]:
        """Whether a write is to pages (or to metadata rows), and to which; those of the window come
        behind the others."""
        data, _, first = self.place(write.target)
        first += PAGES * (data.shape[1] == WINDOW_PAGES)
        touched = set(range(first, first + write.length // data[0, 0].nbytes))
        return data.shape[1] in (PAGES, WINDOW_PAGES), touched


def _none(_: object) -> int:
    return 0
