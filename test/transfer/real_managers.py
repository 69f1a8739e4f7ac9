"""Both KV managers as a scheduler makes them, in this process: SGLang's own threads, sockets,
tables and bootstrap server, and Mooncake's engine over TCP. Only the pool is small."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partialmethod
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zmq
from sglang.srt.disaggregation.base.conn import KVPoll, StateType
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.distributed.device_communicators import mooncake_transfer_engine
from sglang.srt.runtime_context import get_context, get_parallel

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer import listeners, own_processes, thread_watch
from sglang_hma.transfer.bootstrap import HmaBootstrapServer
from sglang_hma.transfer.decode.manager import HmaDecodeManager
from sglang_hma.transfer.endpoints import HmaKVReceiver, HmaKVSender
from sglang_hma.transfer.messages import Claim, frames
from sglang_hma.transfer.prefill.manager import HmaPrefillManager

FORMAT = KVFormat.bfp8(kv_heads=4, head_dim=64, v_head_dim=64, layers=2)
WINDOWED = replace(FORMAT, layers=3, window=33, windowed="4")  # a third layer, with a window
PAGES, ROWS, PAGE_BYTES, ROW_BYTES = 16, 8, 4 * 2 * 1088, 64
WINDOW_PAGES = 9
HOST = "127.0.0.1"


class Memory:
    """One server's pages [buffers, pages, bytes] and metadata rows; SGLang's KVArgs of them.
    `window` are the pages of a layer with a window, which only a `windowed` server has."""

    def __init__(self, *, windowed: bool = False) -> None:
        self.windowed = windowed
        self.format = WINDOWED if windowed else FORMAT
        buffers = 2 * FORMAT.layers
        self.pages = torch.randint(0, 256, (buffers, PAGES, PAGE_BYTES), dtype=torch.uint8)
        self.window = torch.randint(0, 256, (2, WINDOW_PAGES, PAGE_BYTES), dtype=torch.uint8)
        self.rows = torch.randint(0, 256, (2, ROWS, ROW_BYTES), dtype=torch.uint8)

    def kv_args(self) -> Any:
        nothing: list[Any] = []
        windows = [self.window] if self.windowed else []
        return SimpleNamespace(
            engine_rank=0,
            pp_rank=0,
            system_dp_rank=0,
            rust_http_port=None,
            kv_cache_dtype_str="auto",
            kv_layout=str(self.format),
            kv_data_ptrs=[one.data_ptr() for one in self.pages],
            kv_data_lens=[one.nbytes for one in self.pages],
            kv_item_lens=[PAGE_BYTES] * len(self.pages),
            kv_layer_ids=nothing,
            num_draft_entries=0,
            kv_head_num=FORMAT.kv_heads,
            total_kv_head_num=FORMAT.kv_heads,
            page_size=32,
            aux_data_ptrs=[one.data_ptr() for one in self.rows],
            aux_data_lens=[one.nbytes for one in self.rows],
            aux_item_lens=[ROW_BYTES] * len(self.rows),
            ib_device=None,
            gpu_id=0,
            state_types=[StateType.SWA for _ in windows],
            state_data_ptrs=[[one.data_ptr() for one in kind] for kind in windows],
            state_data_lens=[[one.nbytes for one in kind] for kind in windows],
            state_item_lens=[[PAGE_BYTES] * len(kind) for kind in windows],
            state_dim_per_tensor=[[] for _ in windows],
            state_layer_ids=[[] for _ in windows],
        )


def until(condition: Callable[[], Any]) -> Any:
    """What `condition` returns once it is true; pytest's timeout ends a hang."""
    while not (found := condition()):
        time.sleep(0.002)
    return found


@contextmanager
def settings(role: str, bootstrap_port: int) -> Iterator[Any]:
    """What a scheduler of this role finds in its process."""
    given = {
        "disaggregation_mode": role,
        "disaggregation_bootstrap_port": bootstrap_port,
        "disaggregation_transfer_backend": "mooncake_tcp",
        "host": HOST,
    }
    with (
        get_context().override_server_args(**given) as arguments,
        get_parallel().override(
            tp_rank=0,
            attn_tp_rank=0,
            attn_tp_size=1,
            attn_cp_rank=0,
            attn_dp_rank=0,
            attn_dcp_rank=0,
            pp_rank=0,
            pp_group=None,
        ),
    ):
        yield arguments


@dataclass
class Pair:
    """`ended` are the reasons for which a server would have ended."""

    prefill: HmaPrefillManager
    decode: HmaDecodeManager
    prefill_memory: Memory
    decode_memory: Memory
    bootstrap: str
    ended: list[str]
    rooms: Iterator[int] = field(default_factory=lambda: iter(range(1000, 1 << 40)))

    def sender(self, room: int) -> HmaKVSender:
        with settings("prefill", int(self.bootstrap.rpartition(":")[2])):
            return HmaKVSender(mgr=self.prefill, bootstrap_addr=self.bootstrap, bootstrap_room=room)

    def receiver(self, room: int) -> HmaKVReceiver:
        with settings("decode", int(self.bootstrap.rpartition(":")[2])):
            until(lambda: self.decode.try_ensure_parallel_info(self.bootstrap))
            made = HmaKVReceiver(
                mgr=self.decode, bootstrap_addr=self.bootstrap, bootstrap_room=room
            )
            made.init(0)
            return made

    def check(self) -> None:
        """Every thread lives, and a request goes its way."""
        threads = self.prefill.watched_threads() + self.decode.watched_threads()
        assert all(thread.is_alive() for thread in threads), self.ended
        self.transfer(next(self.rooms), [1, 2, 3, 9], [7, 8, 4, 5])
        assert not self.ended

    def transfer(self, room: int, source: Sequence[int], target: Sequence[int]) -> None:
        """One request from beginning to end."""
        arrive(self, self.sender(room), self.receiver(room), source, target)


def arrive(
    pair: Pair,
    sender: HmaKVSender,
    receiver: HmaKVReceiver,
    source: Sequence[int],
    target: Sequence[int],
) -> None:
    """Pages `source` of prefill arrive in pages `target` of decode, and both ends are cleared."""
    pair.decode_memory.pages[:, target] = 0
    receiver.send_metadata(np.array(target, dtype=np.int32), aux_index=0)
    until(lambda: sender.poll() != KVPoll.Bootstrapping)
    sender.init(len(source), 0)
    sender.send(np.array(source, dtype=np.int32))
    until(lambda: receiver.poll() in (KVPoll.Success, KVPoll.Failed))
    assert receiver.poll() == KVPoll.Success, pair.decode.failure_records
    until(lambda: sender.poll() in (KVPoll.Success, KVPoll.Failed))
    assert sender.poll() == KVPoll.Success, pair.prefill.failure_records
    assert torch.equal(pair.decode_memory.pages[:, target], pair.prefill_memory.pages[:, source])
    sender.clear()
    receiver.clear()


def push(port: int, *messages: Sequence[bytes], timeout_ms: int = -1) -> None:
    """Send from a socket of a stranger. Returns when the kernel has all of it, or after a time."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket_:
        socket_.setsockopt(zmq.LINGER, timeout_ms)
        socket_.setsockopt(zmq.SNDHWM, 0)
        socket_.connect(f"tcp://{HOST}:{port}")
        for message in messages:
            socket_.send_multipart(list(message))


def push_and_settle(pair: Pair, role: str, *messages: Sequence[bytes]) -> None:
    """Send from a stranger's socket. Returns when the server has dealt with all of it."""
    room = next(pair.rooms)
    if role == "prefill":
        last = frames(Claim(room, HOST, 9))
        claims = pair.prefill.sender.claims
        push(pair.prefill.rank_port, *messages, last)
        until(lambda: pair.ended or room in claims._early._by_room)
        claims.closed(room)
    else:
        pair.decode.request_status[room] = KVPoll.Bootstrapping
        push(pair.decode.rank_port, *messages, [str(room).encode(), b"0", b"0"])
        until(lambda: pair.ended or pair.decode.request_status[room] == KVPoll.Failed)
        del pair.decode.request_status[room]


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


@contextmanager
def real_pair(secret_files: Mapping[str, str] | None = None) -> Iterator[Pair]:
    """`secret_files`: each role's --hma-cluster-secret-file."""
    secrets = secret_files or {}
    environment = {"MC_FORCE_TCP": "1", "SGLANG_HOST_IP": HOST, "MC_LOG_LEVEL": "ERROR"}
    # A bootstrap server that gets no processor for some seconds is not away.
    environment["SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE"] = "1000000"
    names = *environment, *HmaConfig().environment(), own_processes.KEY_ENV
    before = {name: os.environ.get(name) for name in names}
    with ExitStack() as stack:
        os.environ.update(environment)
        stack.callback(_restore, before)
        port = free_port()
        stack.enter_context(settings("prefill", port))  # SGLang's threads read them
        own_processes.prepare()
        os.environ.update(_config("prefill", secrets).environment())
        bootstrap = HmaBootstrapServer(HOST, port)
        stack.callback(bootstrap.close)
        made, memories, ended = {}, {}, []
        engine_class = mooncake_transfer_engine.MooncakeTransferEngine
        initialize = engine_class.initialize
        engine_class.initialize = partialmethod(_hooked, initialize)
        stack.callback(setattr, engine_class, "initialize", initialize)
        server_end = thread_watch.ServerEnd
        thread_watch.ServerEnd = lambda *_: ended.append
        stack.callback(setattr, thread_watch, "ServerEnd", server_end)
        for role, manager in (("prefill", HmaPrefillManager), ("decode", HmaDecodeManager)):
            os.environ.update(_config(role, secrets).environment())
            memories[role] = Memory()
            mooncake_transfer_engine._mooncake_transfer_engine = None  # each has its own
            mooncake_transfer_engine.init_mooncake_transfer_engine(HOST, 0)
            with settings(role, port) as arguments:
                made[role] = manager(
                    memories[role].kv_args(), DisaggregationMode(role), arguments, False
                )
        yield Pair(
            **made,
            prefill_memory=memories["prefill"],
            decode_memory=memories["decode"],
            bootstrap=f"{HOST}:{port}",
            ended=ended,
        )
        for manager in made.values():
            manager._stopped = True  # threads that wait for messages go on doing so
            manager.outbox.close()


def _hooked(engine: Any, initialize: Callable[..., Any], **options: Any) -> Any:
    """As the seam."""
    return listeners.initialize(initialize, engine, **options)


def _config(role: str, secret_files: Mapping[str, str]) -> HmaConfig:
    return HmaConfig(role=role, device="cpu", cluster_secret_file=secret_files.get(role))


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
