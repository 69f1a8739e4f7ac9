"""A prefill server refuses its half of a request: the decode server that waits for it is told why.

The router sends both halves at once, and waits for decode's answer. What decode knows nothing of (a
prompt that is too long for prefill's pool, an adapter that is not loaded there) would make it wait
until the request counts as lost.
"""

import sys
from collections.abc import Mapping
from typing import Any

PREFIX = "hma-refused-"  # of an AbortReq's rid, before the room
MOST_SAID = 300  # characters of a reason
REFUSES = "the prefill server refuses it: "


def release_states(original: Any, manager: Any, request_states: Mapping[str, Any]) -> None:
    """Around TokenizerManager._release_req_states_on_failure, which SGLang calls while the error
    is handled that kept these requests from the scheduler."""
    from sglang.srt.managers.io_struct import AbortReq

    error = sys.exception()
    rooms = [
        state.obj.bootstrap_room
        for rid, state in request_states.items()
        if not state.dispatched and manager.rid_to_state.get(rid) is state
    ]
    original(manager, request_states)
    if not isinstance(error, Exception):  # the client has left, and decode's half with it
        return
    reason = " ".join(str(error).split())[:MOST_SAID]
    for room in rooms:
        if type(room) is int:
            manager._dispatch_to_scheduler(AbortReq(rid=f"{PREFIX}{room}", abort_message=reason))


def abort_request(original: Any, scheduler: Any, recv_req: Any) -> Any:
    """Around Scheduler.abort_request: what `release_states` says is for the transfer's claims."""
    room = recv_req.rid.removeprefix(PREFIX)
    # A client may name its request so, and its aborts say nothing.
    if room == recv_req.rid or not room.isdecimal() or recv_req.abort_message is None:
        return original(scheduler, recv_req)
    _refuse(scheduler, int(room), recv_req.abort_message)
    return None


def add_request_to_queue(original: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Around Scheduler._add_request_to_queue, which is given refused requests as well."""
    refusal = getattr(req.to_finish, "message", None)
    if refusal is not None and type(req.bootstrap_room) is int:
        _refuse(scheduler, req.bootstrap_room, refusal)
    return original(scheduler, req, *args, **kwargs)


def _refuse(scheduler: Any, room: int, reason: str) -> None:
    sender = scheduler.disagg_prefill_bootstrap_queue.kv_manager.sender
    if sender is not None:
        sender.claims.refused(room, f"{REFUSES}{reason}")


def prepare_abort(
    original: Any, req: Any, error_message: str, status_code: Any = None, **kwargs: Any
) -> None:
    """Around sglang.srt.disaggregation.decode.prepare_abort: such a refusal is the client's to
    mend. SGLang would say 500, and a router takes a server that says so too often for broken."""
    _, refuses, reason = error_message.partition(REFUSES)
    if refuses:
        error_message, status_code = refuses + reason, 400
    original(req, error_message, status_code=status_code, **kwargs)
