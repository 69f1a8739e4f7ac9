"""A server refuses its half of a request: the one that has the other half is told.

The router sends both halves at once, and waits for both answers. What the other server knows
nothing of (a prompt that is too long for this one's pool, an adapter that is not loaded here) would
make it wait until the request counts as lost. Prefill's refusal is answered by decode, with its
reason. Decode's stands for itself, and prefill gives its half up (decode/refusal.py).
"""

import sys
from collections.abc import Mapping
from typing import Any

from sglang_hma.addresses import canonical

PREFIX = "hma-refused-"  # of an AbortReq's rid, before the room, "@" and the bootstrap address
MOST_SAID = 300  # characters of a reason
REFUSES = "the prefill server refuses it: "
GIVEN_UP = "the decode server has given it up"


def release_states(original: Any, manager: Any, request_states: Mapping[str, Any]) -> None:
    """Around TokenizerManager._release_req_states_on_failure, which SGLang calls while the error
    is handled that kept these requests from the scheduler."""
    from sglang.srt.managers.io_struct import AbortReq

    error = sys.exception()
    refused = [
        state.obj
        for rid, state in request_states.items()
        if not state.dispatched and manager.rid_to_state.get(rid) is state
    ]
    original(manager, request_states)
    if not isinstance(error, Exception):  # the client has left, and the other half with it
        return
    reason = " ".join(str(error).split())[:MOST_SAID]
    for asked in refused:
        if (place := place_of(asked)) is not None:
            manager._dispatch_to_scheduler(AbortReq(rid=f"{PREFIX}{place}", abort_message=reason))


def place_of(request: Any) -> str | None:
    """Of the other half of a request, if it has one (an embedding has none): its room and its
    prefill server's bootstrap address."""
    names = ("bootstrap_room", "bootstrap_host", "bootstrap_port")
    room, host, port = (getattr(request, name, None) for name in names)
    if type(room) is not int or not isinstance(host, str) or type(port) is not int:
        return None
    try:
        return f"{room}@{canonical(host, port)}"
    except ValueError:
        return None


def abort_request(original: Any, scheduler: Any, recv_req: Any) -> Any:
    """Around Scheduler.abort_request: what `release_states` says is for the transfer."""
    place = recv_req.rid.removeprefix(PREFIX)
    room, at, _ = place.partition("@")
    # A client may name its request so, and its aborts say nothing.
    said = at and room.isdecimal() and place != recv_req.rid
    if not said or recv_req.abort_message is None:
        return original(scheduler, recv_req)
    tell_other_half(scheduler, place, recv_req.abort_message)
    return None


def add_request_to_queue(original: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Around Scheduler._add_request_to_queue, which is given refused requests as well."""
    refusal = getattr(req.to_finish, "message", None)
    if refusal is not None:
        tell_of(scheduler, req, refusal)
    return original(scheduler, req, *args, **kwargs)


def tell_of(scheduler: Any, req: Any, reason: str = "") -> None:
    """`req` is refused here. Only prefill's `reason` goes further."""
    if (place := place_of(req)) is not None:
        tell_other_half(scheduler, place, reason)


def tell_other_half(scheduler: Any, place: str, reason: str) -> None:
    room, _, address = place.partition("@")
    queue = getattr(scheduler, "disagg_prefill_bootstrap_queue", None)
    if queue is None:
        scheduler.disagg_decode_prealloc_queue.kv_manager.give_up(int(room), address)
    elif queue.kv_manager.sender is not None:
        queue.kv_manager.sender.claims.refused(int(room), f"{REFUSES}{reason}")


def prepare_abort(
    original: Any, req: Any, error_message: str, status_code: Any = None, **kwargs: Any
) -> None:
    """Around sglang.srt.disaggregation.decode.prepare_abort: such a refusal is the client's to
    mend. SGLang would say 500, and a router takes a server that says so too often for broken."""
    _, refuses, reason = error_message.partition(REFUSES)
    if refuses:
        error_message, status_code = refuses + reason, 400
    original(req, error_message, status_code=status_code, **kwargs)


def prepare_abort_on_prefill(
    original: Any, req: Any, error_message: str, status_code: Any = None, **kwargs: Any
) -> None:
    """Around sglang.srt.disaggregation.prefill.prepare_abort: decode, which has given a request up,
    says why; SGLang would say 500 here, which the router prefers to what decode says."""
    if GIVEN_UP in error_message:
        status_code = 400
    original(req, error_message, status_code=status_code, **kwargs)
