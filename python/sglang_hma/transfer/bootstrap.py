"""A prefill server's bootstrap server: where decode servers learn its format and control ports.

Whoever can register there leads every decode server to ports of his choice, so only this server's
own processes may. Its answers carry the number of this start of the server: control ports change
with it, the bootstrap port does not.
"""

import logging
import secrets
from typing import Any

import psutil
from aiohttp import web
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVBootstrapServer
from typing_extensions import override

from sglang_hma.transfer import own_processes, thread_watch
from sglang_hma.transfer.rooms import MAX_ROOM

logger = logging.getLogger(__name__)

BOOT_HEADER = "X-HMA-Boot"
KEY_FIELD = "hma_own_key"


def registration(payload: dict[str, Any]) -> dict[str, Any]:
    """What a process of this server registers, so that HmaBootstrapServer takes it."""
    return payload | {KEY_FIELD: own_processes.key()}


class HmaBootstrapServer(MooncakeKVBootstrapServer):
    """Takes registrations from this server's own processes only, and says in each answer which
    start of the server it is. The server ends when this thread of it does."""

    @override
    def __init__(self, host: str, port: int) -> None:
        self.boot = secrets.token_hex(8)
        self._closing = False
        own_processes.key()  # fails here rather than with every registration
        super().__init__(host=host, port=port)
        end = thread_watch.ServerEnd(psutil.Process())
        thread_watch.ThreadWatch(lambda: [self.thread], lambda: self._closing, end).start()

    @override
    def close(self) -> None:
        self._closing = True
        super().close()

    @override
    def _setup_routes(self) -> None:
        self.app.on_response_prepare.append(self._add_boot)
        super()._setup_routes()

    async def _add_boot(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers[BOOT_HEADER] = self.boot

    @override
    async def _handle_route_put(self, request: web.Request) -> web.StreamResponse:
        row = await _object(request)
        if row is None or not own_processes.is_ours(row.get(KEY_FIELD)):
            return _refused(
                request,
                "registers with another key: only processes of this server may register; on "
                f"several nodes set {own_processes.KEY_ENV} to the same value on each",
            )
        return await super()._handle_route_put(request)

    @override
    async def _handle_register_dp_rank(self, request: web.Request) -> web.StreamResponse:
        """A rank says that it has a room. It knows no key there, so it is known by its address."""
        if not self._from_a_rank(request):
            return _refused(request, "names a rank for a room: only ranks of this server may")
        row = await _object(request) or {}
        room, rank = row.get("bootstrap_room"), row.get("dp_rank")
        if not (_within(room, MAX_ROOM) and _within(rank, (self.dp_size or 1) - 1)):
            return web.Response(text=f"no such room and rank: {room!r}, {rank!r}", status=400)
        return await super()._handle_register_dp_rank(request)

    def _from_a_rank(self, request: web.Request) -> bool:
        """From an address of this host, or from one at which a rank has registered itself."""
        transport = request.transport
        if transport is None:
            return False
        theirs, ours = (transport.get_extra_info(name) for name in ("peername", "sockname"))
        if theirs is None or ours is None:
            return False
        registered = {
            rank.rank_ip
            for by_cp in self.prefill_port_table.values()
            for by_tp in by_cp.values()
            for by_pp in by_tp.values()
            for rank in by_pp.values()
        }
        return theirs[0] in {ours[0], *registered}


async def _object(request: web.Request) -> dict[str, Any] | None:
    """The JSON object in a request's body; None if it is none."""
    try:
        found = await request.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _within(number: object, largest: int) -> bool:
    return type(number) is int and 0 <= number <= largest


def _refused(request: web.Request, why: str) -> web.Response:
    logger.warning(
        "Refused %s %s from %s, who %s", request.method, request.path, request.remote, why
    )
    return web.Response(text=f"refused: who {why}", status=403)
