"""The KV manager of a prefill server."""

import logging
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_TAG, AbortNotification
from sglang.srt.disaggregation.mooncake.conn import KVArgsRegisterInfo, TransferInfo
from typing_extensions import override

from sglang_hma.config import HmaConfig
from sglang_hma.transfer import messages, prompt_logprobs
from sglang_hma.transfer.bootstrap import registration
from sglang_hma.transfer.integrity import memory_of
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.manager import HmaKVManager
from sglang_hma.transfer.message_intake import PrefillIntake
from sglang_hma.transfer.messages import PromptLogprobs
from sglang_hma.transfer.page_slices import Block, Pages
from sglang_hma.transfer.prefill import gauges
from sglang_hma.transfer.prefill.jobs import EarlySend
from sglang_hma.transfer.prefill.link import MooncakeLink
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.outgoing import Destination
from sglang_hma.transfer.prefill.sender import PrefillSender
from sglang_hma.transfer.prefill.strays import Strays
from sglang_hma.transfer.prefill.trace import Trace
from sglang_hma.transfer.refusals import GIVEN_UP

logger = logging.getLogger(__name__)

# Mooncake's TCP transport fails a batch of more than about 2,100 entries with part of it written.
MAX_BATCH_ENTRIES = 1000


class HmaPrefillManager(HmaKVManager):
    """Implements base.PrefillManager with SGLang's tables. `sender` is None unless pages are
    plain. What SGLang would raise for a peer in the thread that receives messages is a reason to
    refuse that peer instead."""

    kv_status_msg_carries_reason = True  # decode's client is told it, too

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sender: PrefillSender | None = None
        self._strays = Strays()
        self._prompt_logprobs: dict[int, list[bytes]] = {}  # parts, by room
        super().__init__(*args, **kwargs)
        if self.plain_pages:
            self.sender = self._make_sender(HmaConfig.require())
            self.intake.handler = self.sender.on_message
            gauges.show(self.sender)
            self.sender.thread.start()

    def _make_sender(self, config: HmaConfig) -> PrefillSender:
        fixed = config.layers_per_send
        return PrefillSender(
            self,
            MooncakeLink(self.engine.engine),
            memory_of(config.device),
            GroupSizer(fixed if isinstance(fixed, int) else None),
            Trace.from_config(f"prefill {self.get_session_id()}", self.attn_tp_rank),
            layers=[each.layers for each in self.buffers],
            rank=self._prefill_unique_rank(),
        )

    @cached_property
    def intake(self) -> PrefillIntake:
        return PrefillIntake(
            self.handshake,
            self.rooms,
            waits=self.deferred_bootstrap is not None,
            try_layout=self._try_layout,
            registered=self._greet,
            drop_session=self._drop_session,
            drop_room=self._drop_room,
        )

    def _greet(self, address: Address) -> None:
        """A decode server lets nobody write whom it has not heard of."""
        if self.keys is not None:
            self.tell(address, messages.Hello())

    def _try_layout(self, info: KVArgsRegisterInfo) -> None:
        """Raises what SGLang would raise for this registration."""
        if self.requires_dcp_relayout(info.dst_dcp_size, info.dst_dcp_rank):
            sizes, drafts = self.kv_args.kv_item_lens, self.kv_args.num_draft_entries
            given = [info.dst_kv_item_len] * (len(sizes) - drafts) + [None] * drafts
            self.prepare_dcp_token_item_lens(given, info.dst_dcp_size)

    def _drop_session(self, session: str) -> None:
        self.decode_kv_args_table.pop(session, None)
        with self.session_lock:
            self._unblacklist_session(session)
            self.state_layout_rejections.pop(session, None)
            self.state_strides_validated.discard(session)

    def _drop_room(self, room: int) -> None:
        """Its request has not arrived here for long, or too many others wait for theirs."""
        if not self.rooms.is_open(room):
            self.intake.forget(room)
            self.transfer_infos.pop(room, None)
            self.req_to_decode_prefix_len.pop(room, None)
            self.request_status.pop(room, None)
            with self.failure_lock:
                self.failure_records.pop(room, None)

    def watched_threads(self) -> list[threading.Thread]:
        more = [self.sender.thread] if self.sender is not None else []
        return [*super().watched_threads(), *more]

    # -- what SGLang asks for --

    @override
    def _register_topology_row(self, url: str, payload: dict[str, Any]) -> None:
        super()._register_topology_row(url, registration(payload))

    @override
    def requires_dcp_relayout(self, dst_dcp_size: int, dst_dcp_rank: int) -> bool:
        try:
            return bool(super().requires_dcp_relayout(dst_dcp_size, dst_dcp_rank))
        except RuntimeError:
            return False  # `_validate_peer_state_layout` refuses it

    def _refuse_dcp(self, info: KVArgsRegisterInfo) -> str | None:
        try:
            super().requires_dcp_relayout(info.dst_dcp_size, info.dst_dcp_rank)
        except RuntimeError as error:
            return str(error)
        return None

    @override
    def _validate_peer_state_layout(
        self, registration_info: KVArgsRegisterInfo
    ) -> tuple[bool, str | None]:
        peer = self.intake.registrations.get(registration_info.mooncake_session_id)
        if peer is None:
            return False, "the decode server has not registered"
        reason = self.handshake.refuse_decode(peer) or self._refuse_dcp(registration_info)
        if reason is not None:
            return False, reason
        fully_checked, reason = super()._validate_peer_state_layout(registration_info)
        return bool(fully_checked), reason

    @override
    def transfer_worker(self, queue: Any, *args: Any, **kwargs: Any) -> None:
        """SGLang's sending thread. For plain pages our send thread does its work, and it waits for
        SGLang to end it."""
        if self.plain_pages:
            queue.get()
        else:
            super().transfer_worker(queue, *args, **kwargs)

    @override
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
        if self.sender is None:
            given = (kv_indices, index_slice, is_last_chunk, aux_index, state_indices)
            kwargs |= {"wait_event": wait_event}
            return super().add_transfer_request(bootstrap_room, *given, num_kv_tokens, **kwargs)
        infos = self.transfer_infos.get(bootstrap_room)
        if infos is None or self.is_failed(bootstrap_room):
            return None
        if all(info.is_dummy for info in infos.values()):
            if is_last_chunk:
                self.update_status(bootstrap_room, KVPoll.Success)
            return None
        for session in infos:
            reason = self._unreachable(session)
            if reason is not None:
                self.fail(bootstrap_room, reason)
                return None
        if is_last_chunk and aux_index is None:
            raise ValueError("the last send of a request needs its metadata buffer")
        early: EarlySend | None = wait_event
        return self.sender.add(
            bootstrap_room,
            kv_indices,
            index_slice,
            early=early,
            metadata_row=aux_index if is_last_chunk else None,
            destinations=(self._destination(i) for i in list(infos.values()) if not i.is_dummy),
            window=self._window(state_indices) if is_last_chunk else None,
        )

    def _window(self, state_indices: Any) -> Pages | None:
        """Pages of the prompt's last window, where those have a pool of their own."""
        if not self.kv_args.state_types:
            return None
        (pages,) = state_indices
        return np.asarray(pages, dtype=np.int32)

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
        session = info.mooncake_session_id
        return Destination.of(
            info,
            self.decode_kv_args_table[session],
            self.buffers,
            self.kv_args,
            rank=(self.attn_tp_rank, self.attn_tp_size),
            generation=self.intake.generation(info.room, session),
        )

    @override
    def _handle_abort_notification(self, msg: list[bytes]) -> bool:
        """As SGLang's, with a reason."""
        told = AbortNotification.from_zmq(msg) if msg[:1] == [ABORT_TAG] else None
        ended = (None, KVPoll.Success, KVPoll.Failed)
        if told is not None and self.request_status.get(told.room) not in ended:
            self.record_failure(told.room, GIVEN_UP)
        return bool(super()._handle_abort_notification(msg))

    @override
    def _maybe_ack_drained_abort(self, room: int) -> None:
        """Decode may reuse a failed request's pages only when nothing can land in them."""
        if self.sender is None or self.sender.is_drained(room):
            super()._maybe_ack_drained_abort(room)

    @override
    def _transfer_data(self, mooncake_session_id: str, transfer_blocks: list[Block]) -> int:
        """Write blocks; 0, or the first failure's code."""
        for start in range(0, len(transfer_blocks), MAX_BATCH_ENTRIES):
            batch = transfer_blocks[start : start + MAX_BATCH_ENTRIES]
            code = super()._transfer_data(mooncake_session_id, batch)
            if code != 0:
                return int(code)
        return 0

    def let_go(self, room: int) -> None:
        """A request was aborted. SGLang may not speak of it again: what decode has said of it is
        then a stray's."""
        self.rooms.close(room)
        self._prompt_logprobs.pop(room, None)
        if self.sender is not None:
            self.sender.claims.closed(room)

    def forget(self, room: int) -> None:
        super().forget(room)
        self._prompt_logprobs.pop(room, None)
        if self.sender is not None:
            self.sender.claims.closed(room)

    # -- what the sender asks for --

    def is_failed(self, room: int) -> bool:
        return bool(self.request_status.get(room, KVPoll.Failed) == KVPoll.Failed)

    def is_concluded(self, room: int) -> bool:
        return self.request_status.get(room) in (None, KVPoll.Success, KVPoll.Failed)

    def fail(self, room: int, reason: str) -> None:
        self.conclude_failure(bootstrap_room=room, failure_reason=reason)

    def succeed(self, room: int) -> None:
        self.update_status(room, KVPoll.Success)

    def keep_logprobs(self, room: int, packed: bytes) -> None:
        """Of a request's prompt, for decode."""
        self._prompt_logprobs[room] = prompt_logprobs.parts(packed)

    @override
    def send_kv_status_message(
        self,
        *,
        targets: list[Address],
        bootstrap_room: int,
        status: KVPoll,
        failure_reason: str | None = None,
    ) -> None:
        """As SGLang's; what decode must have when it hears of a success goes before it."""
        if status == KVPoll.Success:
            parts = self._prompt_logprobs.pop(bootstrap_room, [])
            for index, data in enumerate(parts):
                part = PromptLogprobs(bootstrap_room, index, len(parts), data)
                if not all(self.tell_surely(target, part) for target in targets):
                    self.fail(bootstrap_room, "decode takes no messages")
                    return
        super().send_kv_status_message(
            targets=targets,
            bootstrap_room=bootstrap_room,
            status=status,
            failure_reason=failure_reason,
        )

    def report_sent(self, room: int) -> None:
        self.send_kv_status_message(
            targets=self._room_notify_targets(room), bootstrap_room=room, status=KVPoll.Success
        )

    def report_unopened(self, room: int, ranks: Sequence[Address], reason: str) -> None:
        self.send_kv_status_message(
            targets=list(ranks), bootstrap_room=room, status=KVPoll.Failed, failure_reason=reason
        )

    def forget_strays(self) -> None:
        if self.sender is None:
            return
        told = {*list(self.transfer_infos), *self.intake.rooms()}
        strays = {room for room in told if not self.rooms.is_open(room)}
        for room in self._strays.overdue(strays, time.monotonic()):
            logger.error("Forgetting room %s: its other half never came", room)
            self._drop_room(room)

    # SGLang's own count of what is being sent: it holds back a success while that is above zero.

    def add_sends(self, room: int, change: int) -> None:
        self._staging_outstanding[room] += change

    def sends(self, room: int) -> int:
        return int(self._staging_outstanding.get(room, 0))

    def confirm_drained(self, room: int) -> None:
        self._maybe_ack_drained_abort(room)

    def suspect(self, session: str) -> None:
        with self.session_lock:
            self.session_failures[session] += 1
            self.failed_sessions.add(session)

    def close_room(self, room: int) -> None:
        self._staging_outstanding.pop(room, None)
        self.transfer_infos.pop(room, None)
        self.req_to_decode_prefix_len.pop(room, None)
