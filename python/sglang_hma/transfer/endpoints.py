"""One request's two ends: the sender on prefill, the receiver on decode."""

from collections.abc import Callable
from typing import Any

from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver, MooncakeKVSender

from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.page_slices import Pages

Hold = Callable[[Pages], Callable[[], None]]


class HmaKVSender(MooncakeKVSender):
    """A sender whose early sends wait for layers and never close the request."""

    # Page indices stay on the host: there is no CUDA event to wait for.
    supports_host_tensor_indices = False

    def __init__(self, mgr: Any, *args: Any, **kwargs: Any) -> None:
        self._hold: Hold | None = None
        self._holds: list[Callable[[], None]] = []
        super().__init__(mgr, *args, **kwargs)
        if mgr.outbox is not None:
            mgr.outbox.claims.opened(self.bootstrap_room)

    def send_early(
        self,
        gate: LayerGate,
        forward: LayerGate,
        send: Callable[[], None],
        *,
        hold: Hold | None = None,
    ) -> None:
        """Run `send`, which sends pages of this request, with `gate` in charge of their layers.

        `forward` is the gate of the batch that is about to run. `hold` takes the pages and
        returns what this sender calls when the request has ended.
        """
        self._early_send_wait_event: tuple[LayerGate, LayerGate] | None = gate, forward
        self._hold = hold
        try:
            send()
        finally:
            self._early_send_wait_event = self._hold = None

    def send(self, kv_indices: Pages, *args: Any, **kwargs: Any) -> None:
        # Held whatever has become of the transfer: what SGLang's ranks agree on decides.
        if self._hold is not None and self.conclude_state is None:
            self._holds.append(self._hold(kv_indices))
        super().send(kv_indices, *args, **kwargs)

    # SGLang ends a request with one of these two. Only then may its pages be reused: nothing reads
    # those of a success any more, and a failed room's destination is given up, so that a write or
    # a checksum of it may read whatever comes after.

    def clear(self) -> None:
        try:
            super().clear()
            self.kv_mgr.forget(self.bootstrap_room)
        finally:
            self._let_go()

    def abort(self) -> None:
        try:
            super().abort()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        holds, self._holds = self._holds, []
        for let_go in holds:
            let_go()

    def _prepare_send_indices(self, *args: Any, **kwargs: Any) -> tuple[Any, slice, bool, bool]:
        indices, index, last, skip = super()._prepare_send_indices(*args, **kwargs)
        # The first token travels with the last send, and is not known before the forward ends.
        return indices, index, last and self._early_send_wait_event is None, skip


class HmaKVReceiver(MooncakeKVReceiver):
    """Tells the inbox which pages a request expects, from when to when."""

    def init(self, *args: Any, **kwargs: Any) -> None:
        super().init(*args, **kwargs)
        if self.kv_mgr.describes(self.bootstrap_addr):
            infos = getattr(self, "bootstrap_infos", None) or []
            self.kv_mgr.claim(self.bootstrap_room, infos)

    def send_metadata(self, kv_indices: Pages, *args: Any, **kwargs: Any) -> None:
        if getattr(self, "bootstrap_infos", None):
            infos = self.bootstrap_infos
            self.kv_mgr.expect(self.bootstrap_room, self.bootstrap_addr, kv_indices, infos)
        super().send_metadata(kv_indices, *args, **kwargs)

    def _clear(self) -> None:
        super()._clear()
        self.kv_mgr.forget(self.bootstrap_room)
