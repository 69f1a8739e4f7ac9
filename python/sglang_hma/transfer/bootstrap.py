"""A prefill server's bootstrap server: where decode servers learn its format and control ports.

Whoever can register there leads every decode server to ports of his choice, so only this server's
own processes may. With a cluster secret only its holders are told anything, and each answer proves
that a holder gives it. Answers carry the number of this start of the server: control ports change
with it, the bootstrap port does not. And they say which prompts are too short for it
(short_prompts.py).
"""

import json
import logging
import secrets
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import psutil
from aiohttp import BasicAuth, hdrs, web
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVBootstrapServer
from typing_extensions import override

from sglang_hma import cluster_secret
from sglang_hma.config import HmaConfig
from sglang_hma.transfer import own_processes, thread_watch
from sglang_hma.transfer.rooms import MAX_ROOM
from sglang_hma.transfer.seals import Seals, answer_seal, is_answer, seal

logger = logging.getLogger(__name__)

BOOT_HEADER = "X-HMA-Boot"
OFFLOAD_HEADER = "X-HMA-Offload-Below"
SEAL_HEADER = "X-HMA-Seal"
PROOF_HEADER = "X-HMA-Proof"
SAID_HEADERS = (BOOT_HEADER, OFFLOAD_HEADER)
KEY_FIELD = "hma_own_seal"
TIMEOUT_S = 5
SAME_FILE = "give both servers the same --hma-cluster-secret-file"
OWN_PATHS = {("PUT", "/route"), ("POST", "/register_dp_rank")}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def registration(payload: dict[str, Any]) -> dict[str, Any]:
    """What a process of this server registers, sealed, so that HmaBootstrapServer takes it."""
    return payload | {KEY_FIELD: seal(own_processes.key(), KEY_FIELD, _canonical(payload))}


def register(url: str, payload: dict[str, Any]) -> None:
    """POST a registration. Raises OSError unless it is taken."""
    body = json.dumps(registration(payload)).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=TIMEOUT_S):
        pass


def _canonical(payload: dict[str, Any]) -> bytes:
    said = {name: value for name, value in payload.items() if name != KEY_FIELD}
    return json.dumps(said, sort_keys=True).encode()


def question(method: str, path_and_query: str) -> str:
    """What a seal of a request is for."""
    return f"{method} {path_and_query}"


def _answer(status: int, headers: Mapping[str, str], body: bytes) -> tuple[bytes, ...]:
    """What an answer's proof is of."""
    said = (headers.get(name, "").encode(errors="replace") for name in SAID_HEADERS)
    return str(status).encode(), *said, body


def proves(key: bytes, asked: str, status: int, headers: Mapping[str, str], body: bytes) -> bool:
    """Whether the answer to a request that was sealed with `asked` comes from a holder of the
    key."""
    parts = _answer(status, headers, body)
    return is_answer(key, asked, headers.get(PROOF_HEADER), *parts)


class HmaBootstrapServer(MooncakeKVBootstrapServer):
    """Takes registrations from this server's own processes only, and says in each answer which
    start of the server it is. The server ends when this thread of it does."""

    @override
    def __init__(self, host: str, port: int) -> None:
        self.boot = secrets.token_hex(8)
        below = HmaConfig.require().offload_below
        self._said = {BOOT_HEADER: self.boot, OFFLOAD_HEADER: str(below)}
        self._closing = False
        # What fails, fails here rather than with every request.
        self._own = Seals(own_processes.key())
        keys = cluster_secret.keys()
        self._key = keys.bootstrap if keys is not None else None
        self._cluster = Seals(self._key) if self._key is not None else None
        super().__init__(host=host, port=port)
        end = thread_watch.ServerEnd(psutil.Process())
        thread_watch.ThreadWatch(lambda: [self.thread], lambda: self._closing, end).start()

    @override
    def close(self) -> None:
        self._closing = True
        super().close()

    @override
    def _setup_routes(self) -> None:
        self.app.middlewares.append(self._for_the_cluster)
        self.app.on_response_prepare.append(self._add_headers)
        super()._setup_routes()

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(self._said)

    @web.middleware
    async def _for_the_cluster(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whether this server lives may be asked by all; the handlers of OWN_PATHS know their own
        callers."""
        asked = _seal_of(request)
        open_to_all = request.path == "/health" and not asked
        if self._cluster is None or open_to_all or (request.method, request.path) in OWN_PATHS:
            return await handler(request)
        try:
            purpose = question(request.method, request.path_qs)
            self._cluster.check(purpose, await request.read(), asked)
        except ValueError as error:
            return _refused(request, f"{error}; {SAME_FILE}", status=401)
        response = await handler(request)
        if isinstance(response, web.Response) and self._key is not None and asked is not None:
            body = response.body if isinstance(response.body, bytes) else b""
            parts = _answer(response.status, self._said, body)
            response.headers[PROOF_HEADER] = answer_seal(self._key, asked, *parts)
        return response

    @override
    async def _handle_route_put(self, request: web.Request) -> web.StreamResponse:
        row = await _object(request)
        refused = self._refuse_others(request, row)
        return refused or await super()._handle_route_put(request)

    @override
    async def _handle_register_dp_rank(self, request: web.Request) -> web.StreamResponse:
        """A rank says that it has a room."""
        row = await _object(request)
        refused = self._refuse_others(request, row)
        if refused is not None:
            return refused
        room, rank = (row or {}).get("bootstrap_room"), (row or {}).get("dp_rank")
        if not (_within(room, MAX_ROOM) and _within(rank, (self.dp_size or 1) - 1)):
            return web.Response(text=f"no such room and rank: {room!r}, {rank!r}", status=400)
        return await super()._handle_register_dp_rank(request)

    def _refuse_others(
        self, request: web.Request, row: dict[str, Any] | None
    ) -> web.Response | None:
        """Unless a process of this server has sealed `row`. It may say the same twice: SGLang
        repeats what got no answer."""
        given = row.get(KEY_FIELD) if row is not None else None
        try:
            if row is None or not isinstance(given, str):
                raise ValueError("no seal comes with it")
            self._own.check(KEY_FIELD, _canonical(row), given, again=True)
        except ValueError as error:
            return _refused(
                request,
                f"{error}; only processes of this server may register: on several nodes set "
                f"{own_processes.KEY_ENV} to the same value on each",
            )
        return None


def _seal_of(request: web.Request) -> str | None:
    """In its header, or as the password in the URL where SGLang makes the request."""
    given = request.headers.get(SEAL_HEADER)
    if given is None and (basic := request.headers.get(hdrs.AUTHORIZATION)):
        try:
            return BasicAuth.decode(basic).password
        except ValueError:
            return None
    return given


async def _object(request: web.Request) -> dict[str, Any] | None:
    """The JSON object in a request's body; None if it is none."""
    try:
        found = await request.json()
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _within(number: object, largest: int) -> bool:
    return type(number) is int and 0 <= number <= largest


def _refused(request: web.Request, why: str, status: int = 403) -> web.Response:
    logger.warning("Refused %s %s from %s: %s", request.method, request.path, request.remote, why)
    return web.Response(text=f"refused: {why}", status=status)
