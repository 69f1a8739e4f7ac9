"""Mooncake KV transfer with a format handshake and bounded batches.

Both directions check before a byte moves. Decode reads the prefill server's
descriptor from the bootstrap server and fails the request if it differs.
Prefill reads the decode server's descriptor from its registration message and
rejects the whole session, so that a stock peer, which checks nothing, is
refused too.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.mooncake.conn import (
    ABORT_TAG,
    KVArgsRegisterInfo,
    MooncakeKVManager,
    MooncakeKVSender,
    TransferInfo,
)

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.format import KVFormat, mismatch
from sglang_hma.transfer.refusal import abort_at_prefill, fetch_route

logger = logging.getLogger(__name__)

# Mooncake's TCP transport fails a batch of more than about 2,100 entries with
# part of it written.
MAX_BATCH_ENTRIES = 1000
FORMAT_FRAME = b"HMA-KV"
REGISTRATION = b"None"
# First frames that SGLang itself parses defensively.
SELF_CHECKED = (ABORT_TAG, b"WATERMARK", b"STAGING_RSP")


class HmaKVManager(MooncakeKVManager):
    """SGLang's Mooncake manager, refusing peers whose pages mean something else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._peer_formats: dict[str, str] = {}
        self._peer_lock = threading.Lock()
        super().__init__(*args, **kwargs)
        logger.info("KV format %s: %s", KVFormat.parse(self._ours).digest(), self._ours)

    # -- decode asks prefill --

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As SGLang's, but a mismatch fails the waiting requests, not the server."""
        if bootstrap_addr in self.prefill_info_table:
            return True
        route = fetch_route(bootstrap_addr)
        if route is None:
            return False
        theirs = route.get("kv_layout")
        reason = self._mismatch(theirs if isinstance(theirs, str) else None, their_role="prefill")
        if reason is None:
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
        return [*super().build_receiver_registration_message(), FORMAT_FRAME + self._ours.encode()]

    def _make_worker_recv(self, socket: Any, timeout_ms: int = 500) -> Callable[[], Any]:
        recv = super()._make_worker_recv(socket, timeout_ms)
        if self.disaggregation_mode.value != "prefill":
            return recv

        def checked_recv() -> Any:
            message = recv()
            return message if message is None or self._accepts(message) else None

        return checked_recv

    def _accepts(self, message: list[bytes]) -> bool:
        """Whether a message to the prefill server parses; remembers a peer's format.

        SGLang's receiving thread dies of what it cannot parse, and with it the server.
        """
        try:
            if message[0] in SELF_CHECKED:
                return True
            if message[0] == REGISTRATION:
                self._remember_format(message)
            elif (TransferInfo.from_zmq(message).dst_kv_indices < 0).any():
                raise ValueError("negative page index")
        except Exception as error:
            logger.error("Dropping a malformed message from a decode server: %r", error)
            return False
        return True

    def _remember_format(self, message: list[bytes]) -> None:
        peer = KVArgsRegisterInfo.from_zmq(message).mooncake_session_id
        formats = [frame for frame in message if frame.startswith(FORMAT_FRAME)]
        with self._peer_lock:
            self._peer_formats.pop(peer, None)
            if formats:
                self._peer_formats[peer] = formats[-1][len(FORMAT_FRAME) :].decode("ascii")

    def _validate_peer_state_layout(
        self, registration_info: KVArgsRegisterInfo
    ) -> tuple[bool, str | None]:
        session = registration_info.mooncake_session_id
        with self._peer_lock:
            theirs = self._peer_formats.get(session)
        reason = self._mismatch(theirs, their_role="decode")
        if reason is not None:
            return False, reason
        ours = len(self.kv_args.kv_data_ptrs)
        if len(registration_info.dst_kv_ptrs) != ours:
            count = len(registration_info.dst_kv_ptrs)
            return False, f"the decode server registered {count} KV buffers, this one has {ours}"
        fully_checked, reason = super()._validate_peer_state_layout(registration_info)
        return bool(fully_checked), reason

    # -- both --

    @property
    def _ours(self) -> str:
        return str(self.kv_layout)

    def _mismatch(self, theirs: str | None, *, their_role: str) -> str | None:
        if theirs is None and not HmaConfig.require().packs_kv:
            return None
        our_role = str(self.disaggregation_mode.value)
        return mismatch(self._ours, theirs, our_role=our_role, their_role=their_role)

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


class HmaKVSender(MooncakeKVSender):
    """Page indices stay on the host on CPU: there is no CUDA event to wait for."""

    @property
    def supports_host_tensor_indices(self) -> bool:
        return HmaConfig.require().device == "cuda"
