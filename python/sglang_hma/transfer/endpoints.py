"""The two ends of one request: SGLang's sender on prefill and its receiver on decode."""

import logging
from collections.abc import Callable
from typing import Any

import msgspec
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver, MooncakeKVSender
from typing_extensions import override

from sglang_hma.transfer.decode.routes import parse_rank
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
    def __init__(self, mgr: Any, *args: Any, **kwargs: Any) -> None:
        self._hold: Hold | None = None
        self._holds: list[Callable[[], None]] = []
        super().__init__(mgr, *args, **kwargs)
        if mgr.sender is not None:
            mgr.sender.claims.opened(self.bootstrap_room)

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
        try:
            super().clear()
            self.kv_mgr.forget(self.bootstrap_room)
        finally:
            self._let_go()

    @override
    def abort(self) -> None:
        try:
            super().abort()
        finally:
            self._let_go()

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
    prefill rank that is none, and the ranks' addresses from where they were asked for before."""

    @override
    def init(self, *args: Any, **kwargs: Any) -> None:
        super().init(*args, **kwargs)
        if self.kv_mgr.is_hma_prefill(self.bootstrap_addr):
            infos = getattr(self, "bootstrap_infos", None) or []
            self.kv_mgr.claim(self.bootstrap_room, infos)

    @override
    def _get_bootstrap_info_from_server(
        self, prefill_dp_rank: int, prefill_cp_rank: int, target_tp_rank: int, target_pp_rank: int
    ) -> dict[str, Any] | None:
        place = prefill_dp_rank, prefill_cp_rank, target_tp_rank, target_pp_rank
        known = self.kv_mgr.rank_routes.get(self.bootstrap_addr, {}).get(place)
        info = known or super()._get_bootstrap_info_from_server(*place)
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
        self, kv_indices: Pages, aux_index: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if getattr(self, "bootstrap_infos", None):
            place = self.bootstrap_room, self.bootstrap_addr
            self.kv_mgr.expect(*place, kv_indices, self.bootstrap_infos, aux_index)
        super().send_metadata(kv_indices, aux_index, *args, **kwargs)

    @override
    def _clear(self) -> None:
        super()._clear()
        self.kv_mgr.forget(self.bootstrap_room)
