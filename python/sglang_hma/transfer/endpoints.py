"""The two ends of one request: SGLang's sender on prefill and its receiver on decode.

SGLang's tables are by room. A request whose room belongs to another one fails as soon as SGLang
asks how it does, and never touches what is kept for the other.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import KVTransferError
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver, MooncakeKVSender
from sglang.srt.utils.network import NetworkAddress
from typing_extensions import override

from sglang_hma.transfer import outbox
from sglang_hma.transfer.bootstrap import register
from sglang_hma.transfer.decode.routes import Place, fetch, parse_rank
from sglang_hma.transfer.page_slices import Pages
from sglang_hma.transfer.prefill.jobs import EarlySend

logger = logging.getLogger(__name__)

Hold = Callable[[Pages], Callable[[], None]]


class HmaKVSender(MooncakeKVSender):
    """A sender whose early sends wait for layers and never close the request, and whose pages are
    kept from reuse until SGLang ends it."""

    # Page indices stay on the host: there is no CUDA event to wait for.
    supports_host_tensor_indices = False

    @override
    def __init__(
        self, mgr: Any, bootstrap_addr: str, bootstrap_room: int, *args: Any, **kwargs: Any
    ) -> None:
        self._hold: Hold | None = None
        self._holds: list[Callable[[], None]] = []
        self._refused = mgr.open_room(bootstrap_room)
        super().__init__(mgr, bootstrap_addr, bootstrap_room, *args, **kwargs)
        if self._refused is not None:
            self.conclude_state = KVPoll.Failed
            if not mgr.rooms.is_open(bootstrap_room):
                mgr.request_status.pop(bootstrap_room, None)
        elif mgr.sender is not None:
            mgr.sender.claims.opened(self.bootstrap_room)

    @override
    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        super().init(num_kv_indices, aux_index)
        if num_kv_indices < 1 and self.kv_mgr.sender is not None:
            reason = "decode claims to have more of the prompt than there is"
            self.kv_mgr.fail(self.bootstrap_room, reason)

    @override
    def _register_prefill_dp_rank(self) -> None:
        room, rank = self.bootstrap_room, self.kv_mgr.attn_dp_rank
        url = f"http://{self.bootstrap_server_url}/register_dp_rank"
        try:
            register(url, {"bootstrap_room": room, "dp_rank": rank})
        except OSError as error:
            logger.error("Could not say that rank %s has room %s: %s", rank, room, error)

    def send_early(
        self, early: EarlySend, send: Callable[[], None], *, hold: Hold | None = None
    ) -> None:
        """Run `send`, which sends pages of this request, with `early` in place of SGLang's event:
        HmaPrefillManager.add_transfer_request gets it as `wait_event`.

        `hold` takes the pages and returns what is called when the request has ended.
        """
        self._early_send_wait_event: EarlySend | None = early
        self._hold = hold
        try:
            send()
        finally:
            self._early_send_wait_event = self._hold = None

    @override
    def send(self, kv_indices: Pages, *args: Any, **kwargs: Any) -> None:
        # Held whatever has become of the transfer: ranks that schedule alike must count alike.
        if self._hold is not None and self.conclude_state is None:
            self._holds.append(self._hold(kv_indices))
        super().send(kv_indices, *args, **kwargs)

    # SGLang's scheduler ends each request with one of these two. Only then may its pages be reused:
    # nothing reads those of a success any more, and of a failed room, which is marked as failed
    # before, decode discards what is written. So its last writes may read anything.

    @override
    def clear(self) -> None:
        if self._refused is not None:
            return
        try:
            super().clear()
            self.kv_mgr.forget(self.bootstrap_room)
        finally:
            self._let_go()

    @override
    def abort(self) -> None:
        if self._refused is not None:
            return
        try:
            super().abort()
            self.kv_mgr.let_go(self.bootstrap_room)
        finally:
            self._let_go()

    @override
    def failure_exception(self) -> None:
        if self._refused is not None:
            raise KVTransferError(self.bootstrap_room, self._refused)
        super().failure_exception()

    def _let_go(self) -> None:
        holds, self._holds = self._holds, []
        for let_go in holds:
            let_go()

    @override
    def _prepare_send_indices(self, *args: Any, **kwargs: Any) -> tuple[Any, slice, bool, bool]:
        indices, index, last, skip = super()._prepare_send_indices(*args, **kwargs)
        # The first token travels with the last send, and is not known before the forward ends.
        return indices, index, last and self._early_send_wait_event is None, skip


class HmaKVReceiver(MooncakeKVReceiver):
    """Tells the manager which pages a request expects, from when until when; takes no address of a
    prefill rank that is none, and the ranks' addresses from where they were asked for before. Sends
    without waiting for the peer."""

    @override
    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int | None = None) -> None:
        self._refused = mgr.open_room(bootstrap_room)
        if self._refused is not None:
            # SGLang's constructor writes into its tables. Its classes ask these two first.
            self.bootstrap_room, self.kv_mgr = bootstrap_room, mgr
            self.conclude_state, self._owns_bootstrap_room = KVPoll.Failed, False
            self.abort_notified, self.init_time, self.require_staging = True, None, False
            return
        super().__init__(mgr, bootstrap_addr, bootstrap_room)

    @override
    def init(self, *args: Any, **kwargs: Any) -> None:
        super().init(*args, **kwargs)
        if self._refused is None and self.kv_mgr.is_hma_prefill(self.bootstrap_addr):
            infos = getattr(self, "bootstrap_infos", None) or []
            self.kv_mgr.claim(self.bootstrap_room, infos)

    @override
    def _connect_to_bootstrap_server(self, bootstrap_info: dict[str, Any]) -> tuple[Any, Any]:
        rank = NetworkAddress(str(bootstrap_info["rank_ip"]), int(bootstrap_info["rank_port"]))
        return outbox.Socket(self.kv_mgr.outbox, rank.to_tcp()), contextlib.nullcontext()

    @override
    def _get_bootstrap_info_from_server(
        self, prefill_dp_rank: int, prefill_cp_rank: int, target_tp_rank: int, target_pp_rank: int
    ) -> dict[str, Any] | None:
        place = prefill_dp_rank, prefill_cp_rank, target_tp_rank, target_pp_rank
        known = self.kv_mgr.rank_routes.get(self.bootstrap_addr, {}).get(place)
        info = known or self._ask(place)
        if info is None:
            return None
        info = info | {"pp_rank": target_pp_rank}
        try:
            return msgspec.structs.asdict(parse_rank(info))
        except ValueError as error:
            reason = f"prefill server {self.bootstrap_addr} is refused: {error}"
            logger.error("Room %s: %s", self.bootstrap_room, reason)
            self.kv_mgr.refused[self.bootstrap_room] = reason
            return None

    def _ask(self, place: Place) -> dict[str, Any] | None:
        answer = fetch(self.bootstrap_addr, place)
        return answer.route if answer is not None and answer.denied is None else None

    def prefill_rank(self, index: int) -> int:
        """By which the prefill rank of `bootstrap_infos[index]` calls itself in its messages."""
        info = self.prefill_info
        ranks = [
            tp * info.pp_size * info.attn_cp_size + pp * info.attn_cp_size + cp
            for cp in self.target_cp_ranks
            for tp in self.target_tp_ranks
            for pp in reversed(self.target_pp_ranks)
        ]
        return int(ranks[index])

    @override
    def send_metadata(
        self,
        kv_indices: Pages,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.kv_mgr.rooms.publish(self.bootstrap_room)
        if getattr(self, "bootstrap_infos", None):
            place = self.bootstrap_room, self.bootstrap_addr
            pages = [kv_indices, *(state_indices or ())]
            self.kv_mgr.expect(*place, pages, self.bootstrap_infos, aux_index)
        super().send_metadata(kv_indices, aux_index, state_indices, *args, **kwargs)

    @override
    def _clear(self) -> None:
        super()._clear()
        if self._refused is None:
            self.kv_mgr.forget(self.bootstrap_room)

    @override
    def failure_exception(self) -> None:
        if self._refused is not None:
            raise KVTransferError(self.bootstrap_room, self._refused)
        super().failure_exception()
