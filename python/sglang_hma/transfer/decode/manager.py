"""The KV manager of a decode server."""

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.conn import AbortNotification
from typing_extensions import override

from sglang_hma.config import HmaConfig
from sglang_hma.transfer import messages
from sglang_hma.transfer.claims import ClaimRenewer
from sglang_hma.transfer.decode.quarantine import Quarantine
from sglang_hma.transfer.decode.receiver import DecodeReceiver
from sglang_hma.transfer.decode.refusal import abort_at_prefill, fetch_route
from sglang_hma.transfer.integrity import memory_of
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.manager import HmaKVManager
from sglang_hma.transfer.page_slices import Pages
from sglang_hma.transfer.tcp_table import addresses_of, own_ports

logger = logging.getLogger(__name__)

# Where Mooncake listens, and between which ports.
MOONCAKE_PORTS = (("MC_MIN_RPC_PORT", "15000"), ("MC_MAX_RPC_PORT", "17000"))


class HmaDecodeManager(HmaKVManager):
    """Implements base.DecodeManager with SGLang's tables. `receiver` is None with checksums
    switched off, and unless pages are plain."""

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._hma_prefill_servers: set[str] = set()
        self.receiver: DecodeReceiver | None = None
        super().__init__(*args, **kwargs)
        config = HmaConfig.require()
        if self.plain_pages and config.kv_checksum:
            memory, session = memory_of(config.device), self.get_session_id()
            self.receiver = DecodeReceiver(self, self.buffers, memory, session)
            self.intake.handler = self.receiver.on_message
        self.quarantine = Quarantine(self._mooncake_ports, self._prefill_addresses)
        self._gone: dict[int, set[str]] = {}  # addresses of a room's prefill ranks, all ended
        me = str(self.local_ip), int(self.rank_port)
        self._claim_renewer = ClaimRenewer(
            lambda rank, room: self.tell(rank, messages.Claim(room, *me)),
            lambda rank, rooms: self.tell(rank, messages.Renewal(rooms, *me)),
        )

    # -- handshake --

    @override
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
                self._hma_prefill_servers.add(bootstrap_addr)
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
            self.reject(room, reason)
        args = (self._send_multipart_locked, bootstrap_addr, route, rooms)
        threading.Thread(target=abort_at_prefill, args=args, daemon=True).start()

    @override
    def build_receiver_registration_message(self) -> list[bytes]:
        return [*super().build_receiver_registration_message(), self.handshake.frame()]

    def is_hma_prefill(self, bootstrap_addr: str) -> bool:
        """Whether a prefill server publishes a format descriptor, as ours do."""
        return bootstrap_addr in self._hma_prefill_servers

    # -- what one request's HmaKVReceiver asks for --

    def claim(self, room: int, infos: Sequence[dict[str, Any]]) -> None:
        """Tell prefill ranks that this server has the request's other half, until `forget`."""
        self._claim_renewer.claim(room, control_ports(infos))

    def expect(
        self, room: int, bootstrap_addr: str, pages: Pages, infos: Sequence[dict[str, Any]]
    ) -> None:
        """Pages are about to be published: verify what arrives, if that server makes checksums."""
        if self.receiver is not None and self.is_hma_prefill(bootstrap_addr):
            self.receiver.expect(room, pages, control_ports(infos))

    def forget(self, room: int) -> None:
        super().forget(room)
        self._claim_renewer.drop(room)
        if self.receiver is not None:
            self.receiver.forget(room)

    # -- what SGLang asks for --

    @override
    def build_receiver_metadata_message(self, **kwargs: Any) -> list[bytes]:
        message: list[bytes] = super().build_receiver_metadata_message(**kwargs)
        if self.receiver is not None:
            generation = self.receiver.generation(kwargs["bootstrap_room"])
            message.append(str(generation).encode("ascii") if generation is not None else b"")
        return message

    @override
    def apply_prefill_status(self, *, status: int, **kwargs: Any) -> None:
        """As SGLang's; a success waits until the request's pages are verified."""
        room, rank = kwargs["bootstrap_room"], kwargs["prefill_rank"]
        success = status == KVPoll.Success
        if success and self.receiver is not None and self.receiver.defers_success(room, rank):
            return
        super().apply_prefill_status(status=status, **kwargs)

    # -- pages of failed requests --

    @override
    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        """As SGLang's, and what had reached this host has been read."""
        confirmed = super().is_abort_release_safe(bootstrap_room, required_acks)
        gone = self._gone.get(bootstrap_room)
        return self.quarantine.is_safe(bootstrap_room, confirmed=confirmed, gone=gone)

    @override
    def clear_deferred_abort_state(self, bootstrap_room: int) -> None:
        super().clear_deferred_abort_state(bootstrap_room)
        self.quarantine.forget(bootstrap_room)
        self._gone.pop(bootstrap_room, None)

    def note_gone(self, room: int, ranks: Sequence[Address]) -> None:
        """The processes of all prefill ranks of a failed request have ended."""
        self._gone[room] = set().union(*(addresses_of(host) for host, _ in ranks))

    def ask_again(self, room: int, generation: int | None, ranks: Sequence[Address]) -> None:
        """Ask prefill ranks once more to confirm that nothing is on its way."""
        me = str(self.local_ip), int(self.rank_port)
        question = AbortNotification(room, *me, generation).to_zmq()
        for rank in ranks:
            self.send(rank, question)

    def _mooncake_ports(self) -> set[int]:
        low, high = (int(os.environ.get(name, value)) for name, value in MOONCAKE_PORTS)
        return own_ports(low, high) - {int(self.rank_port)}

    def _prefill_addresses(self) -> set[str]:
        hosts = {address.rpartition(":")[0].strip("[]") for address in self.prefill_info_table}
        return set().union(*(addresses_of(host) for host in hosts))

    # -- what the receiver asks for --

    def accept(self, room: int, prefill_rank: int) -> None:
        super().apply_prefill_status(
            bootstrap_room=room, status=KVPoll.Success, prefill_rank=prefill_rank
        )

    def reject(self, room: int, reason: str) -> None:
        self.record_failure(room, reason)
        self.update_status(room, KVPoll.Failed)


def control_ports(infos: Sequence[dict[str, Any]]) -> list[Address]:
    """Control ports of the prefill ranks in SGLang's bootstrap infos."""
    return [(str(info["rank_ip"]), int(info["rank_port"])) for info in infos]
