"""SGLang's Mooncake KV manager with a format handshake, layer-wise sending and checksums."""

import logging
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.mooncake.conn import (
    ABORT_TAG,
    KVArgsRegisterInfo,
    MooncakeKVManager,
    TransferInfo,
)
from sglang.srt.utils.network import NetworkAddress

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer import messages
from sglang_hma.transfer.decode.receiver import Inbox
from sglang_hma.transfer.decode.refusal import abort_at_prefill, fetch_route
from sglang_hma.transfer.handshake import Handshake
from sglang_hma.transfer.integrity import memory_of
from sglang_hma.transfer.leases import Tenant
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.page_slices import Pages, piece
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.send_thread import MooncakeLink
from sglang_hma.transfer.prefill.sender import Destination, Outbox

logger = logging.getLogger(__name__)

# Mooncake's TCP transport fails a batch of more than about 2,100 entries with
# part of it written.
MAX_BATCH_ENTRIES = 1000
REGISTRATION = b"None"
# First frames that SGLang itself parses defensively.
SELF_CHECKED = (ABORT_TAG, b"WATERMARK", b"STAGING_RSP")


class HmaKVManager(MooncakeKVManager):
    """SGLang's manager; an outbox sends on prefill, an inbox verifies on decode."""

    def __init__(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        self._generations: dict[int, dict[str, int]] = {}
        self._describes: set[str] = set()  # prefill servers that publish a descriptor
        is_mla = bool(rest[2:3] and rest[2]) or bool(kwargs.get("is_mla_backend"))
        self._plain_pages = not args.state_types and not is_mla
        self.outbox: Outbox | None = None
        self.inbox: Inbox | None = None
        super().__init__(args, *rest, **kwargs)
        config = HmaConfig.require()
        memory = memory_of(config.device)
        if self.disaggregation_mode.value == "prefill" and self._plain_pages:
            link = MooncakeLink(self.engine.engine)
            fixed = config.layers_per_send
            sizer = GroupSizer(fixed if isinstance(fixed, int) else None)
            self.outbox = Outbox(self, link, memory, sizer)
        elif self.disaggregation_mode.value == "decode" and self._plain_pages:
            self.inbox = Inbox(self, memory) if config.kv_checksum else None
        self.tenant = self._own_tenant()
        layout = self.handshake.layout
        logger.info("KV format %s: %s", KVFormat.parse(layout).digest(), layout)

    @cached_property
    def handshake(self) -> Handshake:
        return Handshake(
            str(self.kv_layout),
            self.kv_args.kv_item_lens,
            role=str(self.disaggregation_mode.value),
            attn_tp=int(self.attn_tp_size),
            stock_allowed=not HmaConfig.require().packs_kv,
            plain=self._plain_pages,
        )

    # -- decode asks prefill --

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As SGLang's, but a mismatch fails the waiting requests, not the server."""
        if bootstrap_addr in self.prefill_info_table:
            return True
        route = fetch_route(bootstrap_addr)
        if route is None:
            return False
        reason = self.handshake.refuse_prefill(route)
        if reason is None:
            if route.get("kv_layout") is not None:
                self._describes.add(bootstrap_addr)
            return bool(super().try_ensure_parallel_info(bootstrap_addr))
        self._refuse(bootstrap_addr, route, reason)
        return False

    def _refuse(self, bootstrap_addr: str, route: dict[str, Any], reason: str) -> None:
        rooms = [
            room
            for room in list(self.addr_to_rooms_tracker.get(bootstrap_addr, ()))
            if self.request_status.get(room) != KVPoll.Failed
        ]
        logger.error("Refusing prefill server %s: %s", bootstrap_addr, reason)
        for room in rooms:
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)
        args = (self._send_multipart_locked, bootstrap_addr, route, rooms)
        threading.Thread(target=abort_at_prefill, args=args, daemon=True).start()

    # -- prefill asks decode --

    def build_receiver_registration_message(self) -> list[bytes]:
        return [*super().build_receiver_registration_message(), self.handshake.frame()]

    def _make_worker_recv(self, socket: Any, timeout_ms: int = 500) -> Callable[[], Any]:
        recv = super()._make_worker_recv(socket, timeout_ms)

        def checked_recv() -> Any:
            message = recv()
            if message is None or self._handles(message):
                return None
            return message if self._is_decode or self._accepts(message) else None

        return checked_recv

    def _handles(self, message: list[bytes]) -> bool:
        """Whether a message was one of ours; broken ones are dropped with a line in the log."""
        try:
            ours = messages.parse(message)
            if isinstance(ours, messages.Group):
                if self.inbox is not None:
                    self.inbox.on_group(ours)
            elif ours is not None and self.outbox is not None:
                self.outbox.on_message(ours)
        except ValueError as error:
            logger.error("Dropping a malformed message from a peer: %s", error)
            return True
        except Exception:  # this thread must outlive whatever a peer sends
            logger.exception("A message from a peer was dropped")
            return True
        return ours is not None

    @property
    def _is_decode(self) -> bool:
        return bool(self.disaggregation_mode.value == "decode")

    def _accepts(self, message: list[bytes]) -> bool:
        """Whether a message to the prefill server parses; remembers a peer's format.

        SGLang's receiving thread dies of what it cannot parse, and with it the server.
        """
        try:
            if message[0] in SELF_CHECKED:
                return True
            if message[0] == REGISTRATION:
                self.handshake.remember(message)
            else:
                self._remember_request(message)
        except Exception as error:
            logger.error("Dropping a malformed message from a decode server: %r", error)
            return False
        return True

    def _remember_request(self, message: list[bytes]) -> None:
        """A decode server's pages for one request, and the generation it wants echoed."""
        info = TransferInfo.from_zmq(message)
        if (info.dst_kv_indices < 0).any():
            raise ValueError("negative page index")
        if len(message) > 10 and message[10]:
            generation = int(message[10].decode("ascii"))
            self._generations.setdefault(info.room, {})[info.mooncake_session_id] = generation

    def _validate_peer_state_layout(
        self, registration_info: KVArgsRegisterInfo
    ) -> tuple[bool, str | None]:
        reason = self.handshake.refuse_decode(registration_info)
        if reason is not None:
            return False, reason
        fully_checked, reason = super()._validate_peer_state_layout(registration_info)
        return bool(fully_checked), reason

    # -- prefill sends --

    def transfer_worker(self, *args: Any, **kwargs: Any) -> None:
        """SGLang's sending thread; the outbox's pump replaces it for plain K and V pages."""
        if not self._plain_pages:
            super().transfer_worker(*args, **kwargs)

    def add_transfer_request(
        self,
        bootstrap_room: int,
        kv_indices: Pages,
        index_slice: slice,
        is_last_chunk: bool,
        aux_index: int | None = None,
        state_indices: Any = None,
        num_kv_tokens: int | None = None,
        *,
        wait_event: Any = None,
        **kwargs: Any,
    ) -> None:
        """Queue pages of a request. `wait_event` is what HmaKVSender.send_early was given."""
        if self.outbox is None:
            given = (kv_indices, index_slice, is_last_chunk, aux_index, state_indices)
            kwargs |= {"wait_event": wait_event}
            return super().add_transfer_request(bootstrap_room, *given, num_kv_tokens, **kwargs)
        infos = self.transfer_infos.get(bootstrap_room)
        if infos is None or self.outbox.unwanted(bootstrap_room):
            return None
        if all(info.is_dummy for info in infos.values()):
            if is_last_chunk:
                self.update_status(bootstrap_room, KVPoll.Success)
            return None
        gate, forward = wait_event if wait_event is not None else (None, None)
        for session in infos:
            reason = self._unreachable(session)
            if reason is not None:
                self.conclude_failure(bootstrap_room=bootstrap_room, failure_reason=reason)
                return None
        return self.outbox.add(
            bootstrap_room,
            kv_indices,
            index_slice,
            gate=gate,
            forward=forward,
            last=is_last_chunk,
            aux=aux_index,
            destinations=(self._destination(i) for i in list(infos.values()) if not i.is_dummy),
        )

    def _unreachable(self, session: str) -> str | None:
        with self.session_lock:
            refusal = self.state_layout_rejections.get(session)
            if refusal is not None:
                return str(refusal)
            if session not in self.failed_sessions:
                return None
            probe = self.failed_session_probes.get(session)
            if probe is not None:
                probe.last_requested = time.monotonic()
        return f"decode server {session} does not take KV pages at the moment"

    def _destination(self, info: TransferInfo) -> Destination:
        peer = self.decode_kv_args_table[info.mooncake_session_id]
        sizes = self.kv_args.kv_item_lens
        layers = len(sizes) // 2
        pairs = list(zip(self.kv_args.kv_data_ptrs, peer.dst_kv_ptrs, sizes, strict=True))
        ours = self.attn_tp_rank, self.attn_tp_size
        theirs = peer.dst_tp_rank % peer.dst_attn_tp_size, peer.dst_attn_tp_size
        pieces = [piece(*pair, ours=ours, theirs=theirs) for pair in pairs]
        return Destination(
            session=info.mooncake_session_id,
            endpoint=info.endpoint,
            port=info.dst_port,
            generation=self._generations.get(info.room, {}).get(info.mooncake_session_id),
            pages=info.dst_kv_indices,
            pieces=tuple((pieces[i], pieces[layers + i]) for i in range(layers)),
            aux_index=info.dst_aux_index,
        )

    def forget(self, room: int) -> None:
        """The request has ended on this server, in whatever way."""
        self._generations.pop(room, None)
        self.tenant.drop(room)
        if self.outbox is not None:
            self.outbox.claims.closed(room)
        if self.inbox is not None:
            self.inbox.forget(room)

    def _maybe_ack_drained_abort(self, room: int) -> None:
        """Decode may reuse a failed request's pages only when nothing can land in them."""
        if self.outbox is None or self.outbox.settled(room):
            super()._maybe_ack_drained_abort(room)

    # -- decode receives --

    def describes(self, bootstrap_addr: str) -> bool:
        """Whether a prefill server is one of ours: it publishes a descriptor."""
        return bootstrap_addr in self._describes

    def claim(self, room: int, infos: list[dict[str, Any]]) -> None:
        """Tell prefill ranks that this server has the request's other half, until `forget`."""
        self.tenant.take(room, [(str(info["rank_ip"]), int(info["rank_port"])) for info in infos])

    def _tell(self, rank: Address, message: messages.Message) -> None:
        self.send_frames(*rank, messages.frames(message))

    def _own_tenant(self) -> Tenant:
        me = str(self.local_ip), int(self.rank_port)
        return Tenant(
            lambda rank, room: self._tell(rank, messages.Claim(room, *me)),
            lambda rank, rooms: self._tell(rank, messages.Held(rooms, *me)),
        )

    def expect(self, room: int, bootstrap_addr: str, pages: Pages, infos: list[Any]) -> None:
        """Pages are about to be published: compare what arrives, if that server makes checksums."""
        if self.inbox is not None and self.describes(bootstrap_addr):
            self.inbox.expect(room, pages, infos)

    def build_receiver_metadata_message(self, **kwargs: Any) -> list[bytes]:
        message: list[bytes] = super().build_receiver_metadata_message(**kwargs)
        if self.inbox is not None:
            generation = self.inbox.generation(kwargs["bootstrap_room"])
            message.append(str(generation).encode("ascii") if generation is not None else b"")
        return message

    def apply_prefill_status(self, *, status: int, **kwargs: Any) -> None:
        """As SGLang's; a success waits until the request's pages were compared."""
        room, rank = kwargs["bootstrap_room"], kwargs["prefill_rank"]
        if (
            status == KVPoll.Success
            and self.inbox is not None
            and self.inbox.holds_back(room, rank)
        ):
            return
        super().apply_prefill_status(status=status, **kwargs)

    def commit_success(self, room: int, rank: int) -> None:
        super().apply_prefill_status(bootstrap_room=room, status=KVPoll.Success, prefill_rank=rank)

    # -- both --

    def send_frames(self, host: str, port: int, frames: list[bytes]) -> None:
        """To a peer's control socket; a peer that is gone is noticed elsewhere."""
        address = NetworkAddress(host, port)
        try:
            self._send_multipart_locked(address.to_tcp(), frames, is_ipv6=address.is_ipv6)
        except Exception as error:
            logger.warning("Could not tell %s: %s", address.to_host_port_str(), error)

    def _transfer_data(
        self, mooncake_session_id: str, transfer_blocks: list[tuple[int, int, int]]
    ) -> int:
        """Write (source, target, length) blocks; 0, or the first failure's code."""
        for start in range(0, len(transfer_blocks), MAX_BATCH_ENTRIES):
            batch = transfer_blocks[start : start + MAX_BATCH_ENTRIES]
            code = super()._transfer_data(mooncake_session_id, batch)
            if code != 0:
                return int(code)
        return 0
