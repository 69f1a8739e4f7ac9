"""SGLang's Mooncake KV manager with a format handshake: what both roles have in common.

Names that are private to SGLang's manager are used here and in the two subclasses,
prefill/manager.py and decode/manager.py, and nowhere else.
"""

import logging
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import zmq
from sglang.srt.disaggregation.base.conn import StateType
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager
from sglang.srt.utils.network import NetworkAddress
from typing_extensions import override
from zmq.auth.thread import ThreadAuthenticator

from sglang_hma import cluster_secret
from sglang_hma.cluster_secret import ClusterKeys, server_role
from sglang_hma.config import HmaConfig
from sglang_hma.gauges import GAUGES
from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer import curve, listeners, messages
from sglang_hma.transfer.control_socket import MAX_FRAME_BYTES, CheckedSocket
from sglang_hma.transfer.handshake import Handshake, OwnMemory
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.message_intake import DecodeIntake, MessageIntake
from sglang_hma.transfer.outbox import Outbox
from sglang_hma.transfer.page_slices import Buffers
from sglang_hma.transfer.rooms import Rooms
from sglang_hma.transfer.thread_watch import ThreadWatch

logger = logging.getLogger(__name__)


class HmaKVManager(MooncakeKVManager):
    """SGLang's manager with a format handshake and our messages beside its own, whose threads never
    wait for a peer and get nothing from one that was not checked. When one ends, the server does.

    `plain_pages`: the pool has K and V pages of heads, or it is two of such pools, one of layers
    with a window. Latent and state buffers are left to SGLang: there are no layers to send early
    and no checksums then."""

    @override
    def __init__(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        is_mla = bool(rest[2:3] and rest[2]) or bool(kwargs.get("is_mla_backend"))
        windowed = HmaConfig.require().packs_kv and args.state_types == [StateType.SWA]
        self.plain_pages = not is_mla and (windowed or not args.state_types)
        self.authenticator: ThreadAuthenticator | None = None
        super().__init__(args, *rest, **kwargs)
        if self.server_socket.get(zmq.MAXMSGSIZE) != MAX_FRAME_BYTES:
            raise RuntimeError("SGLang's control socket takes messages of any size")
        if self.keys is not None and self.server_socket.get(zmq.MECHANISM) != zmq.CURVE:
            raise RuntimeError("SGLang's control socket takes messages without the cluster secret")
        layout = self.handshake.layout
        logger.info("KV format %s: %s", KVFormat.parse(layout).digest(), layout)
        GAUGES.gauge(
            "kv_blocked_messages",
            "Control messages that wait because their peers take none",
            self.outbox,
            Outbox.count_waiting,
        )
        GAUGES.counter(
            "kv_lost_messages",
            "Control messages that were lost because their peers took none",
            self.outbox,
            Outbox.count_lost,
        )
        ThreadWatch(self.watched_threads, lambda: self._stopped).start()

    @property
    def _zmq_ctx(self) -> zmq.Context[zmq.Socket[bytes]]:
        """SGLang makes it, and then its control socket from it, whose frames are bounded so, and
        whose peers must know the cluster secret, if there is one."""
        return self._bounded_context

    @_zmq_ctx.setter
    def _zmq_ctx(self, made: zmq.Context[zmq.Socket[bytes]]) -> None:
        options: dict[int, int | bytes] = {zmq.MAXMSGSIZE: MAX_FRAME_BYTES}
        if self.keys is not None:
            role = server_role()
            self.authenticator = curve.authenticator(made, self.keys, role)
            options |= curve.listening_options(self.keys, role)
        for option, value in options.items():
            made.setsockopt(option, value)
        self._bounded_context = made

    def watched_threads(self) -> list[threading.Thread]:
        """Without one of these the server cannot serve."""
        threads = [*self._worker_threads, self.outbox.thread]
        return threads + ([self.authenticator.thread] if self.authenticator is not None else [])

    @cached_property
    def buffers(self) -> tuple[Buffers, ...]:
        """Of each kind of pages."""
        args = self.kv_args
        starts, sizes = [args.kv_data_ptrs], [args.kv_item_lens]
        if self.plain_pages:
            starts, sizes = starts + args.state_data_ptrs, sizes + args.state_item_lens
        return tuple(map(Buffers, map(tuple, starts), map(tuple, sizes)))

    # These are first used before SGLang starts the thread that receives messages.

    @cached_property
    def handshake(self) -> Handshake:
        return Handshake(
            str(self.kv_layout),
            OwnMemory.of(self.kv_args, len(self.buffers)),
            role=str(self.disaggregation_mode.value),
            attn_tp=int(self.attn_tp_size),
            stock_allowed=not HmaConfig.require().packs_kv,
            plain=self.plain_pages,
        )

    @cached_property
    def rooms(self) -> Rooms:
        return Rooms()

    @cached_property
    def intake(self) -> MessageIntake:
        return DecodeIntake(self.rooms, waits=self.defer_decode_allocation)

    @cached_property
    def outbox(self) -> Outbox:
        options = curve.calling_options(self.keys, server_role()) if self.keys is not None else None
        return Outbox(options)

    @cached_property
    def keys(self) -> ClusterKeys | None:
        return cluster_secret.keys()

    @override
    def _make_worker_recv(self, socket: Any, timeout_ms: int = 500) -> Callable[[], Any]:
        checked = CheckedSocket(socket, self._screen)
        return super()._make_worker_recv(checked, timeout_ms)

    def _screen(self, message: list[bytes], sender: str) -> list[bytes] | None:
        if self.keys is not None:  # only who knows the secret can send it
            listeners.admit(self.engine, sender)
        return self.intake.screen(message, sender)

    @override
    def _send_multipart_locked(
        self, endpoint: str, parts: list[bytes], is_ipv6: bool = False
    ) -> None:
        self.outbox.put(endpoint, parts)

    def tell(self, address: Address, message: messages.Message) -> None:
        """Send a message to a peer's control port; a peer that is gone is noticed elsewhere."""
        self.send(address, messages.frames(message))

    def tell_surely(self, address: Address, message: messages.Message) -> bool:
        """As `tell`; False if the peer takes none, and then it is not sent."""
        endpoint = NetworkAddress(*address).to_tcp()
        return self.outbox.put(endpoint, messages.frames(message), kept=True)

    def send(self, address: Address, frames: list[bytes]) -> None:
        """As `tell`, for SGLang's own messages."""
        self.outbox.put(NetworkAddress(*address).to_tcp(), frames)

    def open_room(self, room: int | None) -> str | None:
        """Why a request cannot have this room, or None; `forget` gives it back."""
        reason = self.rooms.open(room)
        if reason is None and room is not None:
            self.intake.opened(room)
        return reason

    def forget(self, room: int) -> None:
        """The request has ended on this server, in whatever way."""
        self.rooms.close(room)
        self.intake.forget(room)
