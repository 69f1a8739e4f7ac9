"""SGLang's Mooncake KV manager with a format handshake: what both roles have in common.

Names that are private to SGLang's manager are used here and in the two subclasses,
prefill/manager.py and decode/manager.py, and nowhere else.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager
from sglang.srt.utils.network import NetworkAddress
from typing_extensions import override

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer import messages
from sglang_hma.transfer.handshake import Handshake
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.message_intake import MessageIntake
from sglang_hma.transfer.page_slices import Buffers

logger = logging.getLogger(__name__)


class HmaKVManager(MooncakeKVManager):
    """SGLang's manager with a format handshake and our messages beside its own.

    `plain_pages`: the pool has K and V pages of heads. Latent and state buffers are left to
    SGLang: there are no layers to send early and no checksums then."""

    @override
    def __init__(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        is_mla = bool(rest[2:3] and rest[2]) or bool(kwargs.get("is_mla_backend"))
        self.plain_pages = not args.state_types and not is_mla
        super().__init__(args, *rest, **kwargs)
        layout = self.handshake.layout
        logger.info("KV format %s: %s", KVFormat.parse(layout).digest(), layout)

    @property
    def buffers(self) -> Buffers:
        return Buffers(tuple(self.kv_args.kv_data_ptrs), tuple(self.kv_args.kv_item_lens))

    # Both are first used before SGLang starts the thread that receives messages.

    @cached_property
    def handshake(self) -> Handshake:
        return Handshake(
            str(self.kv_layout),
            self.kv_args.kv_item_lens,
            role=str(self.disaggregation_mode.value),
            attn_tp=int(self.attn_tp_size),
            stock_allowed=not HmaConfig.require().packs_kv,
            plain=self.plain_pages,
        )

    @cached_property
    def intake(self) -> MessageIntake:
        return MessageIntake(self.handshake)

    @override
    def _make_worker_recv(self, socket: Any, timeout_ms: int = 500) -> Callable[[], Any]:
        recv, intake = super()._make_worker_recv(socket, timeout_ms), self.intake

        def screened_recv() -> Any:
            message = recv()
            return intake.screen(message) if message is not None else None

        return screened_recv

    def tell(self, address: Address, message: messages.Message) -> None:
        """Send a message to a peer's control port; a peer that is gone is noticed elsewhere."""
        self.send(address, messages.frames(message))

    def send(self, address: Address, frames: list[bytes]) -> None:
        """As `tell`, for SGLang's own messages."""
        peer = NetworkAddress(*address)
        try:
            self._send_multipart_locked(peer.to_tcp(), frames, is_ipv6=peer.is_ipv6)
        except Exception as error:
            logger.warning("Could not tell %s: %s", peer.to_host_port_str(), error)

    def forget(self, room: int) -> None:
        """The request has ended on this server, in whatever way."""
        self.intake.forget(room)
