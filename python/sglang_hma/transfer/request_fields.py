"""The bootstrap fields of a request: which prefill server has its other half, under what number.

SGLang's router puts them into a request. Whoever reaches a server's port can write them too, and
SGLang's scheduler acts on them as they are: it asks the address that they name for the place of
the KV pages, and a value that it cannot work with ends it. So they are checked before.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sglang_hma.addresses import canonical
from sglang_hma.config import HmaConfig
from sglang_hma.transfer.rooms import MAX_ROOM

FAKE_HOST = "2.2.2.2"  # sglang.srt.disaggregation.utils.FAKE_BOOTSTRAP_HOST
HEALTH_CHECKS = ("/health", "/health_generate")

THROUGH_THE_ROUTER = "send requests to the router, which fills it in"


class Peers:
    """The prefill servers that a decode server takes KV pages from.

    `addresses` are bootstrap addresses as `addresses.canonical` writes them; None allows any.
    """

    def __init__(self, addresses: Collection[str] | None) -> None:
        self.addresses = None if addresses is None else frozenset(addresses)

    def refuse(self, host: object, port: object) -> str | None:
        """Why a request's bootstrap_host and bootstrap_port are refused, or None."""
        if not isinstance(host, str):
            return f"bootstrap_host is {shown(host)}, not a host: {THROUGH_THE_ROUTER}"
        if type(port) is not int or not 1 <= port <= 65535:
            return f"bootstrap_port is {shown(port)}, not a port: {THROUGH_THE_ROUTER}"
        try:
            address = canonical(host, port)
        except ValueError as error:
            return f"bootstrap_host is {shown(host)}: {error}"
        if self.addresses is not None and address not in self.addresses:
            return (
                f"{address} is none of the prefill servers of this decode server "
                "(--hma-prefill-peers): send requests to the router"
            )
        return None


def refuse_room(room: object) -> str | None:
    if type(room) is not int or not 1 <= room <= MAX_ROOM:
        return (
            f"bootstrap_room is {shown(room)}, not a number from 1 to 2^63 - 1: "
            f"{THROUGH_THE_ROUTER}"
        )
    return None


def shown(value: object) -> str:
    """As an error repeats it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def init_req_state(original: Any, manager: Any, obj: Any, request: Any = None) -> Any:
    """Around TokenizerManager._init_req_state, which sees each request first, in lists of equal
    length if there are several in one. Raises ValueError, which SGLang answers with HTTP 400."""
    from sglang.srt.runtime_context import get_disagg

    port = get_disagg().disaggregation_bootstrap_port
    reason = refuse(obj, configured_peers(), port=port, may_fake=_is_own(manager, request))
    if reason is not None:
        raise ValueError(reason)
    return original(manager, obj, request)


def _is_own(manager: Any, request: Any) -> bool:
    """Whether a request comes from this server itself: from its health check, which makes its own
    request, or before it says that it is up, when nothing but its warm-up should come."""
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    if request is None or manager.server_status == ServerStatus.Starting:
        return True
    scope = getattr(request, "scope", None) or {}
    path = str(scope.get("path", "")).removeprefix(str(scope.get("root_path", "")))
    return path in HEALTH_CHECKS


def refuse(obj: Any, peers: Peers, *, port: int, may_fake: bool) -> str | None:
    """Why a request (SGLang's GenerateReqInput, normalized) is refused, or None.

    `port` stands where none is given. `may_fake`: it may name SGLang's fake host, and then decode
    generates without a prompt's pages.
    """
    if not hasattr(obj, "bootstrap_room"):
        return None  # an embedding; a generating model refuses it
    try:
        rows = list(_rows(obj))
    except ValueError as error:
        return str(error)
    rooms = set()
    for host, given, room in rows:
        if host == FAKE_HOST and may_fake:
            continue
        if reason := refuse_one(peers, host, port if given is None else given, room):
            return reason
        if room in rooms:
            return f"bootstrap_room is {room} for two requests in one: give each its own"
        rooms.add(room)
    return None


def refuse_one(peers: Peers, host: object, port: object, room: object) -> str | None:
    """Why the fields of one request are refused, or None."""
    if host == FAKE_HOST:
        return f"bootstrap_host is {FAKE_HOST}, which is for this server's own health checks"
    return refuse_room(room) or peers.refuse(host, port)


def configured_peers() -> Peers:
    config = HmaConfig.require()
    return Peers(config.prefill_peers if config.role == "decode" else None)


def _rows(obj: Any) -> Iterator[tuple[object, object, object]]:
    """(host, port, room) of each request in one. Raises ValueError for lists of a wrong length."""
    names = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
    values = [getattr(obj, name) for name in names]
    if obj.is_single:
        columns: list[Sequence[object]] = [[value] for value in values]
    else:
        # Of several samples of a prompt SGLang reads the first of its rows.
        prompts = obj.batch_size
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, list) or len(value) != len(obj.rid):
                raise ValueError(
                    f"{name} is {shown(value)}: give one value, or one for each of the "
                    f"{prompts} prompts"
                )
        columns = [value[:prompts] for value in values]
    yield from zip(*columns, strict=True)
