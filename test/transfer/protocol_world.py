"""What lies between a prefill and a decode server, simulated: time, messages, writes and what the
two hosts' kernels hold of them. Nothing happens here unless the test says so.

A write that Mooncake has given up may go on as an orphan: its bytes are in prefill's kernel, then
in the network or in decode's, and land long after the failure was seen.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation import decode as sglang_decode
from sglang.srt.disaggregation.common import conn as common_conn
from sglang.srt.disaggregation.mooncake import conn as mooncake_conn

from sglang_hma.kvcache import layer_gate
from sglang_hma.transfer import claims, control_socket, drain, registrations, sglang_messages
from sglang_hma.transfer import manager as manager_module
from sglang_hma.transfer.decode import manager as decode_manager
from sglang_hma.transfer.decode import quarantine, queues, receiver, refusal, routes
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.prefill import manager as prefill_manager
from sglang_hma.transfer.prefill import outgoing, send_thread, sender, trace
from sglang_hma.transfer.tcp_table import FIN_WAIT1, Connection
from sglang_hma.transfer.thread_watch import ThreadWatch

PREFILL_IP, DECODE_IP = "10.0.0.1", "10.0.0.2"
BOOTSTRAP = f"{PREFILL_IP}:8998"
ESTABLISHED = 1

READS_TIME = (
    *(claims, drain, registrations, layer_gate, quarantine, queues, receiver, refusal),
    *(outgoing, send_thread, sender, trace, prefill_manager),
    *(common_conn, mooncake_conn, sglang_decode),
)
STARTS_THREADS = (claims, decode_manager, common_conn, mooncake_conn)


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    time = perf_counter = thread_time = monotonic

    def sleep(self, seconds: float) -> None:
        """Only the test lets time pass."""


class ParkedThread:
    """A thread that was started, and runs when the test says so."""

    parked: list["ParkedThread"]

    def __init__(self, target: Callable[..., Any], args: Any = (), **_: Any) -> None:
        self.target, self.args = target, args
        self.name = getattr(target, "__name__", "")

    def start(self) -> None:
        self.parked.append(self)


class Drained(BaseException):
    """A thread that waits for messages has taken all there were."""


class Inbox:
    """A control socket, and what SGLang's loop reads: `screen` decides as it does on a real one."""

    def __init__(self, shared: "Inbox | None" = None, screen: Any = None) -> None:
        self.waiting: list[list[bytes]] = shared.waiting if shared is not None else []
        self.screen = screen

    def get(self, option: int) -> int:
        return control_socket.MAX_FRAME_BYTES

    def recv_multipart(self) -> Any:
        if not self.waiting:
            raise Drained
        return self.screen(self.waiting.pop(0), "a peer")


class Stage(Enum):
    RUNNING = auto()  # Mooncake has it
    SENDING = auto()  # in prefill's kernel, in a connection that no process holds
    FLYING = auto()  # given up by prefill's kernel; packets are still in the network
    UNREAD = auto()  # in decode's kernel
    COPIED = auto()  # read from it, and on its way to a device's memory
    ENDED = auto()


@dataclass(eq=False)
class Write:
    """`target` is an address in `to`'s memory; `data` is what an orphan carries."""

    by: Any
    to: Any
    source: int
    target: int
    length: int
    port: int
    since_s: float
    stage: Stage = Stage.RUNNING
    status: int = 0
    flips: bool = False
    data: Any = None


class Later(Executor):
    """Work that waits until the test has it done: checksums are made at any time."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        made: Future[Any] = Future()
        self.waiting.append(lambda: made.set_result(work(*args, **kwargs)))
        return made

    def work(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


@dataclass
class World:
    """`servers` are by control address, the dead ones too. `wire` are messages on their way:
    (from, to, frames). Nothing passes while the link is `cut`."""

    clock: Clock
    servers: dict[Address, Any] = field(default_factory=dict)
    by_session: dict[str, Any] = field(default_factory=dict)
    wire: list[tuple[Any, Address, list[bytes]]] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    handles: dict[int, Write] = field(default_factory=dict)
    half_open: list[tuple[Any, int, float]] = field(default_factory=list)
    parked: list[ParkedThread] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what did not hold; SGLang may swallow errors
    cut: bool = False
    windowed: bool = False  # whether both servers have a second pool, of a layer with a window
    next_flips: bool = False
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 40)))

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)

    # -- messages --

    def put(self, sender: Any, endpoint: str, frames: Sequence[bytes]) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        if sender.alive:
            self.wire.append((sender, (host, int(port)), list(frames)))

    def deliver(self, index: int, *, again: bool = False) -> None:
        _, address, frames = self.wire[index]
        if not again:
            del self.wire[index]
        server = self.servers.get(address)
        if server is not None and server.alive:
            server.receive(frames)

    def drop(self, index: int) -> None:
        sender, _, frames = self.wire.pop(index)
        sender.registration_lost |= frames[0] == sglang_messages.REGISTRATION

    def is_gone(self, address: Address) -> bool:
        return not self.cut and not self.servers[address].alive

    # -- Mooncake's writes --

    def submit(self, by: Any, session: str, source: int, target: int, length: int) -> int:
        number, to = next(self.numbers), self.by_session[session]
        write = Write(by, to, source, target, length, number, self.clock.now_s)
        write.flips, self.next_flips = self.next_flips, False
        if not to.alive:
            write.status, write.stage = -1, Stage.ENDED
        else:
            self.writes.append(write)
        self.handles[number] = write
        return number

    def status(self, handle: int) -> int:
        status = self.handles[handle].status
        if status:
            del self.handles[handle]
        return status

    def running(self) -> list[Write]:
        return [each for each in self.writes if each.stage is Stage.RUNNING]

    def orphans(self) -> list[Write]:
        return [each for each in self.writes if each.stage is not Stage.RUNNING]

    def land(self, write: Write) -> None:
        write.data = write.by.memory_at(write.source, write.length).copy()
        if write.flips:
            write.data[write.length // 2] ^= 0x10
        self._store(write)
        write.status = 1

    def fail(self, write: Write, *, stored: bool, orphan: bool) -> None:
        """Mooncake gives it up, with its bytes stored or not, or left to the kernel."""
        write.data = write.by.memory_at(write.source, write.length).copy()
        write.status = -1
        if stored:
            self._store(write)
        else:
            self._become(write, Stage.SENDING if orphan else Stage.ENDED)

    def _store(self, write: Write) -> None:
        if write.to.alive:
            write.to.store(write)
        self._become(write, Stage.ENDED)

    def _become(self, write: Write, stage: Stage) -> None:
        write.stage, write.since_s = stage, self.clock.now_s
        if stage is Stage.ENDED and write in self.writes:
            self.writes.remove(write)

    def move(self, write: Write, *, given_up: bool = False) -> None:
        """An orphan's next stage."""
        if write.stage is Stage.SENDING and given_up:
            self.half_open.append((write.to, write.port, self.clock.now_s))
            self._become(write, Stage.FLYING)
        elif write.stage is Stage.FLYING and given_up:
            self._become(write, Stage.ENDED)
        elif write.stage in (Stage.SENDING, Stage.FLYING) and not self.cut:
            self._become(write, Stage.UNREAD)
        elif write.stage is Stage.UNREAD:
            self._become(write, Stage.COPIED)
        elif write.stage is Stage.COPIED:
            self._store(write)

    def end_of(self, server: Any, *, orphans: bool) -> None:
        """A process has died: nobody holds its connections any more."""
        for write in list(self.writes):
            if write.by is server and write.stage is Stage.RUNNING:
                self.fail(write, stored=False, orphan=orphans)
            elif write.to is server:
                write.status = write.status or -1
                self._become(write, Stage.ENDED)

    def rows(self, ip: str) -> list[Connection]:
        """A host's table of connections."""
        found = []
        for write in self.writes:
            ours, theirs = (PREFILL_IP, 40000 + write.port), (DECODE_IP, write.to.rpc_port)
            if ip == PREFILL_IP and write.stage is Stage.SENDING:
                found.append(Connection(ours, theirs, FIN_WAIT1, write.length, 0, 0))
            if ip == PREFILL_IP and write.stage is Stage.RUNNING:
                found.append(Connection(ours, theirs, ESTABLISHED, write.length, 0, 7))
            if ip == DECODE_IP and write.stage not in (Stage.COPIED, Stage.FLYING):
                unread = write.length if write.stage is Stage.UNREAD else 0
                found.append(Connection(theirs, ours, ESTABLISHED, 0, unread, 7))
        if ip == DECODE_IP:
            found += [
                Connection((DECODE_IP, to.rpc_port), (PREFILL_IP, 40000 + port), 1, 0, 0, 7)
                for to, port, _ in self.half_open
                if all(one.remote[1] != 40000 + port for one in found)
            ]
        return found

    # -- time --

    def pass_time(self, seconds: float) -> None:
        """Mooncake and the kernels give up what makes no progress."""
        self.clock.now_s += seconds
        now = self.clock.now_s
        for write in list(self.writes):
            age = now - write.since_s
            if write.stage is Stage.RUNNING and age > 20:
                self.fail(write, stored=False, orphan=True)
            elif write.stage is Stage.SENDING and age > 100:
                self.move(write, given_up=True)
            elif write.stage is Stage.FLYING and age >= drain.NETWORK_S:
                self._become(write, Stage.ENDED)
            elif write.stage is Stage.COPIED and age >= quarantine.COPY_S:
                self._store(write)
        self.half_open = [each for each in self.half_open if now - each[2] < 400]


@contextmanager
def simulated(*, windowed: bool) -> Iterator[World]:
    """A world, and every module's time, threads, sockets and tables taken from it."""
    world = World(Clock(), windowed=windowed)
    thread = type("Thread", (ParkedThread,), {"parked": world.parked})
    threads = SimpleNamespace(**{**vars(threading), "Thread": thread})
    with pytest.MonkeyPatch.context() as patch:
        for module in READS_TIME:
            patch.setattr(module, "time", world.clock)
        for module in STARTS_THREADS:
            patch.setattr(module, "threading", threads)
        for kind in (ThreadWatch, send_thread.SendThread):
            patch.setattr(kind, "start", lambda self: None)
        patch.setattr(manager_module, "CheckedSocket", Inbox)
        patch.setattr(sender, "connections", lambda: world.rows(PREFILL_IP))
        patch.setattr(sender, "addresses_of", lambda host: {host})
        patch.setattr(decode_manager, "addresses_of", lambda host: {host})
        patch.setattr(sglang_decode, "all_reduce_flags", lambda *, flags, **_: flags)
        patch.setattr(common_conn.CommonKVManager, "register_to_bootstrap", lambda self: None)
        patch.setattr(routes, "fetch", lambda *asked: _route(world, *asked))
        yield world


def _route(world: World, address: str, place: routes.Place = routes.SERVER) -> Any:
    prefill = next((one for one in world.servers.values() if one.alive and one.is_prefill), None)
    return prefill.answer(place) if prefill is not None and not world.cut else None
