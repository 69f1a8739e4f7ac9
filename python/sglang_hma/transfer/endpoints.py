"""The two ends of one request: SGLang's sender on prefill and its receiver on decode."""

from collections.abc import Callable
from typing import Any

from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver, MooncakeKVSender
from typing_extensions import override

from sglang_hma.transfer.page_slices import Pages
from sglang_hma.transfer.prefill.jobs import EarlySend


class HmaKVSender(MooncakeKVSender):
    """A sender whose early sends wait for layers and never close the request."""

    # Page indices stay on the host: there is no CUDA event to wait for.
    supports_host_tensor_indices = False

    @override
    def __init__(self, mgr: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(mgr, *args, **kwargs)
        if mgr.sender is not None:
            mgr.sender.claims.opened(self.bootstrap_room)

    def send_early(self, early: EarlySend, send: Callable[[], None]) -> None:
        """Run `send`, which sends pages of this request, with `early` in place of SGLang's event:
        HmaKVManager.add_transfer_request gets it as `wait_event`."""
        self._early_send_wait_event: EarlySend | None = early
        try:
            send()
        finally:
            self._early_send_wait_event = None

    @override
    def clear(self) -> None:
        super().clear()
        self.kv_mgr.forget(self.bootstrap_room)

    @override
    def _prepare_send_indices(self, *args: Any, **kwargs: Any) -> tuple[Any, slice, bool, bool]:
        indices, index, last, skip = super()._prepare_send_indices(*args, **kwargs)
        # The first token travels with the last send, and is not known before the forward ends.
        return indices, index, last and self._early_send_wait_event is None, skip


class HmaKVReceiver(MooncakeKVReceiver):
    """Tells the manager which pages a request expects, from when until when."""

    @override
    def init(self, *args: Any, **kwargs: Any) -> None:
        super().init(*args, **kwargs)
        if self.kv_mgr.is_hma_prefill(self.bootstrap_addr):
            infos = getattr(self, "bootstrap_infos", None) or []
            self.kv_mgr.claim(self.bootstrap_room, infos)

    @override
    def send_metadata(self, kv_indices: Pages, *args: Any, **kwargs: Any) -> None:
        if getattr(self, "bootstrap_infos", None):
            infos = self.bootstrap_infos
            self.kv_mgr.expect(self.bootstrap_room, self.bootstrap_addr, kv_indices, infos)
        super().send_metadata(kv_indices, *args, **kwargs)

    @override
    def _clear(self) -> None:
        super()._clear()
        self.kv_mgr.forget(self.bootstrap_room)
