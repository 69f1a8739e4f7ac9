"""Whether two servers may exchange KV pages: both sides decide before any byte moves.

Decode reads prefill's format descriptor from the bootstrap server. Prefill reads decode's from its
registration message, so that a stock SGLang server, which checks nothing, is refused as well.
"""

import threading
from collections.abc import Sequence
from typing import Any

from sglang.srt.disaggregation.mooncake.conn import KVArgsRegisterInfo

from sglang_hma.kvcache.format import KVFormat, mismatch
from sglang_hma.transfer.page_slices import check_page_bytes, unsupported

FORMAT_FRAME = b"HMA-KV"


class Handshake:
    """One server's side.

    `layout` is its descriptor, `page_bytes` the bytes of a page in each registered buffer.
    `stock_allowed`: a peer without a descriptor is accepted as a stock SGLang server.
    `plain`: the pool has K and V pages of heads; SGLang itself checks all others.
    """

    def __init__(
        self,
        layout: str,
        page_bytes: Sequence[int],
        *,
        role: str,
        attn_tp: int,
        stock_allowed: bool,
        plain: bool,
    ) -> None:
        self.layout = layout
        self.page_bytes = tuple(page_bytes)
        self.role = role
        self.attn_tp = attn_tp
        self.stock_allowed = stock_allowed
        self.plain = plain
        self._decoders: dict[str, str] = {}
        self._lock = threading.Lock()

    def frame(self) -> bytes:
        """What a decode server appends to its registration message."""
        return FORMAT_FRAME + self.layout.encode()

    def remember(self, message: list[bytes]) -> None:
        """Keep the format in a decode server's registration message.

        Raises what SGLang's parser raises for a malformed one.
        """
        peer = KVArgsRegisterInfo.from_zmq(message).mooncake_session_id
        formats = [frame for frame in message if frame.startswith(FORMAT_FRAME)]
        with self._lock:
            self._decoders.pop(peer, None)
            if formats:
                self._decoders[peer] = formats[-1][len(FORMAT_FRAME) :].decode("ascii")

    def refuse_prefill(self, route: dict[str, Any]) -> str | None:
        """Why this decode server refuses a prefill server, or None; `route` is from its bootstrap
        server."""
        theirs = route.get("kv_layout")
        text = theirs if isinstance(theirs, str) else None
        reason = self._mismatch(text, their_role="prefill")
        if reason is not None or text is None:
            return reason
        return self._refuse_tp(route.get("attn_tp_size"))

    def refuse_decode(self, info: KVArgsRegisterInfo) -> str | None:
        """Why this prefill server refuses a decode server, or None."""
        with self._lock:
            theirs = self._decoders.get(info.mooncake_session_id)
        reason = self._mismatch(theirs, their_role="decode")
        if reason is not None:
            return reason
        if len(info.dst_kv_ptrs) != len(self.page_bytes):
            return (
                f"the decode server registered {len(info.dst_kv_ptrs)} KV buffers, "
                f"this one has {len(self.page_bytes)}"
            )
        if not self.plain:
            return None
        if info.dst_tp_rank < 0:
            return f"the decode server says that its rank is {info.dst_tp_rank}"
        return self._refuse_tp(info.dst_attn_tp_size) or check_page_bytes(
            self.page_bytes, info.dst_kv_item_lens, self.attn_tp, info.dst_attn_tp_size
        )

    def _refuse_tp(self, theirs: Any) -> str | None:
        if not isinstance(theirs, int) or theirs < 1:
            return f"the peer says that its attention TP size is {theirs!r}"
        sizes = (self.attn_tp, theirs) if self.role == "prefill" else (theirs, self.attn_tp)
        return unsupported(KVFormat.parse(self.layout), *sizes)

    def _mismatch(self, theirs: str | None, *, their_role: str) -> str | None:
        if theirs is None and self.stock_allowed:
            return None
        return mismatch(self.layout, theirs, our_role=self.role, their_role=their_role)
