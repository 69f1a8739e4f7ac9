"""The KV manager of a decode server."""

import logging
import os
import threading
from collections.abc import Mapping, Sequence, Set
from typing import Any

import msgspec
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.conn import AbortNotification, PrefillServerInfo
from typing_extensions import override

from sglang_hma.config import HmaConfig
from sglang_hma.gauges import GAUGES
from sglang_hma.transfer import messages, prompt_logprobs
from sglang_hma.transfer.claims import ClaimRenewer
from sglang_hma.transfer.decode import routes
from sglang_hma.transfer.decode.news import News
from sglang_hma.transfer.decode.quarantine import Quarantine
from sglang_hma.transfer.decode.receiver import DecodeReceiver
from sglang_hma.transfer.decode.refusal import abort_at_prefill
from sglang_hma.transfer.decode.route_asker import RouteAsker
from sglang_hma.transfer.integrity import memory_of
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.manager import HmaKVManager
from sglang_hma.transfer.metrics import STUCK_PEERS
from sglang_hma.transfer.page_slices import Pages, PageSlice
from sglang_hma.transfer.prompt_logprobs import Parts
from sglang_hma.transfer.request_fields import FAKE_HOST, configured_peers
from sglang_hma.transfer.short_prompts import is_short
from sglang_hma.transfer.tcp_table import addresses_of, own_ports

logger = logging.getLogger(__name__)

# Where Mooncake listens, and between which ports.
MOST_GIVING_UP = 32  # threads, of seconds each
MOONCAKE_PORTS = (("MC_MIN_RPC_PORT", "15000"), ("MC_MAX_RPC_PORT", "17000"))


class HmaDecodeManager(HmaKVManager):
    """Implements base.DecodeManager with SGLang's tables. `receiver` is None with checksums
    switched off, and unless pages are plain."""

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._hma_prefill_servers: set[str] = set()
        self._boots: dict[str, str | None] = {}  # of the prefill servers whose ports are known
        self._offload_below: dict[str, int] = {}  # tokens of a prompt, by prefill server
        self._asker = RouteAsker()
        self.news = News()
        self.rank_routes: dict[str, Mapping[routes.Place, dict[str, Any]]] = {}
        self._peers = configured_peers()
        self._giving_up = threading.BoundedSemaphore(MOST_GIVING_UP)
        self.refused: dict[int, str] = {}  # rooms whose prefill server was refused, and why
        self.receiver: DecodeReceiver | None = None
        self._prompt_logprobs: dict[int, Parts] = {}  # by room
        super().__init__(*args, **kwargs)
        config = HmaConfig.require()
        if config.prefill_peers is None:
            logger.warning(
                "Pages are taken from any prefill server that a request names: give "
                "--hma-prefill-peers, or let nobody but the router reach this server"
            )
        if self.plain_pages and config.kv_checksum:
            memory, session = memory_of(config.device), self.get_session_id()
            sizes = zip(self.kv_args.aux_data_ptrs, self.kv_args.aux_item_lens, strict=True)
            rows = [PageSlice.part(buffer, size) for buffer, size in sizes]
            self.receiver = DecodeReceiver(self, self.buffers, memory, session, rows)
        self.intake.handler = self._on_message
        low, high = (int(os.environ.get(name, value)) for name, value in MOONCAKE_PORTS)
        ports = own_ports(low, high) - {int(self.rank_port)}
        GAUGES.gauge(
            "kv_stuck_peers",
            STUCK_PEERS,
            self,
            HmaDecodeManager.count_silent,
        )
        self.quarantine = Quarantine(ports, self._prefill_addresses)
        self._gone: dict[int, set[str]] = {}  # addresses of a failed room's ranks that have ended
        me = str(self.local_ip), int(self.rank_port)
        self._claim_renewer = ClaimRenewer(
            lambda rank, room: self.tell(rank, messages.Claim(room, *me)),
            lambda rank, rooms: self.tell(rank, messages.Renewal(rooms, *me)),
        )

    def count_silent(self) -> int:
        """Prefill servers whose last heartbeat has failed."""
        return sum(failures > 0 for failures in list(self.heartbeat_failures.values()))

    # -- handshake --

    @override
    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As SGLang's, but asks in another thread, and a mismatch or a nonsensical answer fails the
        waiting requests, not the server."""
        if bootstrap_addr in self.prefill_info_table:
            return True
        found = self._asker.look(bootstrap_addr)
        if found is None:
            return False
        answer = found.answer
        try:
            if answer.denied is not None:
                raise ValueError(answer.denied)
            route = routes.parse(answer.route)
            # Of the formats first: that line says most.
            reason = self.handshake.refuse_prefill(answer.route) or self._unsuitable(route)
            if reason is not None:
                raise ValueError(reason)
            self._boots[bootstrap_addr] = answer.boot
            self._offload_below[bootstrap_addr] = answer.offload_below
            self.rank_routes[bootstrap_addr] = found.ranks
            if route.kv_layout is None:
                self._hma_prefill_servers.discard(bootstrap_addr)
            else:
                self._hma_prefill_servers.add(bootstrap_addr)
            if self.plain_pages and self.dcp_size == 1:
                self._take(bootstrap_addr, route)
                return True
            return self._let_sglang_ask(bootstrap_addr, route)
        except ValueError as error:
            self._refuse(bootstrap_addr, answer.route, str(error))
            return False

    def _take(self, bootstrap_addr: str, route: routes.Route) -> None:
        """Which of the prefill server's ranks are this rank's, as SGLang has it."""
        info = PrefillServerInfo(**msgspec.structs.asdict(route))
        try:
            self._resolve_rank_mapping(info)
        except AssertionError as error:
            raise ValueError(" ".join(str(error).split())) from error
        self.prefill_info_table[bootstrap_addr] = info

    def _unsuitable(self, route: routes.Route) -> str | None:
        return routes.unsuitable(
            route,
            page_size=self.kv_args.page_size,
            kv_cache_dtype=self.kv_cache_dtype_str,
            pp_size=self.pp_size,
            packs_kv=HmaConfig.require().packs_kv,
        )

    def _let_sglang_ask(self, bootstrap_addr: str, checked: routes.Route) -> bool:
        """SGLang's own method, which asks for itself and knows pools that are not plain: whether it
        has got an answer.

        Raises ValueError if SGLang refuses that, or if it is not the one that was checked.
        """
        sealed = routes.sealed_address(bootstrap_addr)
        try:
            if not super().try_ensure_parallel_info(sealed):
                return False
        except (RuntimeError, AssertionError) as error:
            raise ValueError(" ".join(str(error).split())) from error
        info = self.prefill_info_table.pop(sealed)
        if any(getattr(info, name) != getattr(checked, name) for name in routes.CHECKED):
            raise ValueError("its bootstrap server gave two different answers in a row")
        self.prefill_info_table[bootstrap_addr] = info
        return True

    def _refuse(self, bootstrap_addr: str, route: dict[str, Any], reason: str) -> None:
        rooms = self._waiting(bootstrap_addr)
        logger.error("Refusing prefill server %s: %s", bootstrap_addr, reason)
        for room in rooms:
            self.refused[room] = f"prefill server {bootstrap_addr} is refused: {reason}"
            self.reject(room, reason)
        self._abort_there(bootstrap_addr, route, rooms)

    def _waiting(self, bootstrap_addr: str) -> list[int]:
        """Rooms that wait for a prefill server."""
        return [
            room
            for room in list(self.addr_to_rooms_tracker.get(bootstrap_addr, ()))
            if self.request_status.get(room) not in (None, KVPoll.Failed, KVPoll.Success)
        ]

    def give_up(self, room: int, bootstrap_addr: str) -> None:
        """A request was refused here, whose prefill server would wait for it. Nobody is told while
        many are, nor a server that no request may name."""
        host, _, port = bootstrap_addr.rpartition(":")
        if host == FAKE_HOST or self._peers.refuse(host, int(port)) is not None:
            return
        if not self._giving_up.acquire(blocking=False):
            return
        info = self.prefill_info_table.get(bootstrap_addr)

        def tell() -> None:
            try:
                if info is not None:
                    route = {"dp_size": info.dp_size, "attn_tp_size": info.attn_tp_size}
                elif (answer := routes.fetch(bootstrap_addr)) is not None:
                    route = answer.route
                else:
                    return
                abort_at_prefill(self._send_multipart_locked, bootstrap_addr, route, [room])
            finally:
                self._giving_up.release()

        threading.Thread(target=tell, daemon=True).start()

    def _abort_there(self, bootstrap_addr: str, route: dict[str, Any], rooms: list[int]) -> None:
        """Their other halves would wait, and the router with them."""
        args = (self._send_multipart_locked, bootstrap_addr, route, rooms)
        threading.Thread(target=abort_at_prefill, args=args, daemon=True).start()

    @override
    def _on_heartbeat_success(self, bootstrap_addr: str) -> None:
        """A prefill server that was restarted between two heartbeats answers on its bootstrap port
        as before, but its control ports are others: SGLang would wait there for minutes."""
        super()._on_heartbeat_success(bootstrap_addr)
        answer = routes.fetch(bootstrap_addr)
        if answer is None or bootstrap_addr not in self.prefill_info_table:
            return
        if answer.denied is None and answer.boot == self._boots.get(bootstrap_addr):
            return
        rooms = self._waiting(bootstrap_addr)
        why = "was restarted" if answer.denied is None else f"is refused: {answer.denied}"
        logger.error("Prefill server %s %s", bootstrap_addr, why)
        self._handle_node_failure(bootstrap_addr)
        self._abort_there(bootstrap_addr, answer.route, rooms)

    @override
    def build_receiver_registration_message(self) -> list[bytes]:
        return [*super().build_receiver_registration_message(), self.handshake.frame()]

    def is_hma_prefill(self, bootstrap_addr: str) -> bool:
        """Whether a prefill server publishes a format descriptor, as ours do."""
        return bootstrap_addr in self._hma_prefill_servers

    def leaves_to_decode(self, bootstrap_addr: str, req: Any) -> bool:
        """Whether that prefill server, which is known, leaves a request's prompt to this server."""
        below = self._offload_below.get(bootstrap_addr, 0)
        return is_short(req, len(req.origin_input_ids), below)

    def refuse_rank(self, room: int, bootstrap_addr: str, dp_rank: int) -> bool:
        """Whether a request is refused because its prefill server, which is known, has no such
        data-parallel rank. A client may name one, and prefill refuses it too."""
        info = self.prefill_info_table.get(bootstrap_addr)
        if info is None or 0 <= dp_rank < info.dp_size:
            return False
        last = info.dp_size - 1
        reason = (
            f"disagg_prefill_dp_rank is {dp_rank}, "
            f"and the ranks of prefill server {bootstrap_addr} are 0 to {last}"
        )
        self.refused[room] = reason
        self.reject(room, reason)
        return True

    # -- what one request's HmaKVReceiver asks for --

    def claim(self, room: int, infos: Sequence[dict[str, Any]]) -> None:
        """Tell prefill ranks that this server has the request's other half, until `forget`."""
        self._claim_renewer.claim(room, control_ports(infos))

    def expect(
        self,
        room: int,
        bootstrap_addr: str,
        pages: Sequence[Pages],
        infos: Sequence[dict[str, Any]],
        row: int | None,
    ) -> None:
        """Pages of each kind and a row for the metadata are about to be published: verify what
        arrives, if that server makes checksums."""
        if self.receiver is not None and self.is_hma_prefill(bootstrap_addr):
            self.receiver.expect(room, pages, control_ports(infos), row)

    def _on_message(self, message: messages.Message) -> None:
        if isinstance(message, messages.PromptLogprobs):
            if self.rooms.is_published(message.room):
                arrived = self._prompt_logprobs.setdefault(message.room, Parts())
                arrived.add(message.part, message.parts, message.data)
        elif self.receiver is not None:
            self.receiver.on_message(message)

    def take_logprobs(self, room: int, vocabulary: int) -> dict[str, list[Any]] | None:
        """Of a request's prompt, as SGLang's ReqLogprob has them; None if prefill sent none, or
        nonsense."""
        arrived = self._prompt_logprobs.pop(room, None)
        packed = arrived.whole() if arrived is not None else None
        if packed is None:
            return None
        try:
            return prompt_logprobs.unpack(packed, vocabulary)
        except ValueError as error:
            logger.error("Room %s: no logprobs of its prompt: %s", room, error)
            return None

    def forget(self, room: int) -> None:
        super().forget(room)
        self.refused.pop(room, None)
        self._prompt_logprobs.pop(room, None)
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

    @override
    def update_status(self, bootstrap_room: int, status: int) -> None:
        super().update_status(bootstrap_room, status)
        self.news.note()

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

    def confirmed_ranks(self, room: int) -> Set[int]:
        """Prefill ranks, by their own numbers, that send nothing more for a failed request."""
        state = self._deferred_abort_ack_tracker.get(room)
        return state.prefill_ranks if state is not None else frozenset()

    def note_gone(self, room: int, ranks: Sequence[Address]) -> None:
        """The processes of these prefill ranks, all that have not confirmed, have ended."""
        if room not in self._gone:
            self._gone[room] = set().union(*(addresses_of(host) for host, _ in ranks))

    def repeat_abort(self, room: int, generation: int | None, ranks: Sequence[Address]) -> None:
        """Ask prefill ranks once more to confirm that nothing is on its way. They listen to none
        that has not registered, and that message may be the one that was lost."""
        me = str(self.local_ip), int(self.rank_port)
        registration = self.build_receiver_registration_message()
        question = AbortNotification(room, *me, generation).to_zmq()
        for rank in ranks:
            self.send(rank, registration)
            self.send(rank, question)

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
