"""The entry: an ASGI application that hands requests to SGLang's router, and its answers back."""

import asyncio
import hmac
import json
import re
import time
from collections.abc import Iterable
from typing import Any

import aiohttp

from sglang_hma.entry.carrier import CARRIED, CONTENT_TYPE, ROUTE, STATUS, pack

# Of one connection, not of a request (RFC 9110, 7.6.1), and what is written anew.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade host content-length expect".split()
)
# What aiohttp would add to a request that has none.
NOT_THE_CLIENTS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
KEEP_ALIVE_S = 15.0
# What the router does not know or answers for itself, and a decode server as one server does: about
# the model, its tokenizer and its load. Nothing that changes a server.
OF_A_SERVER = (
    *("/v1/models", "/get_model_info", "/model_info", "/get_server_info", "/server_info"),
    *("/get_load", "/v1/loads", "/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"),
    *(
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/classify",
        "/v1/rerank",
        "/v1/score",
        "/encode",
        "/classify",
    ),
)
# The metrics of all servers, each with its own label.
METRICS, OF_ALL_SERVERS = "/metrics", "/engine_metrics"
# The router writes underscores for the colons in their names.
RENAMED = re.compile(rb"^((?:# (?:HELP|TYPE) )?(?:sglang_hma|sglang))_", re.MULTILINE)
LOOK_AGAIN_S = 1.0
Headers = list[tuple[bytes, bytes]]


class Entry:
    """`router`: its URL. `limit`: bytes of a request's body. `key`: the router's API key, which is
    asked for where a request goes past the router."""

    def __init__(self, router: str, limit: int, key: str | None = None) -> None:
        self._router, self._limit = router, limit
        self._authorization = f"Bearer {key}".encode() if key else None
        self._session: aiohttp.ClientSession | None = None
        self._decode, self._looked = "", -LOOK_AGAIN_S

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        # A request lasts as long as its answer does, and there are as many as clients have.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=NOT_THE_CLIENTS,
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._session.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        body = await self._read(receive)
        if body is None:
            await refuse(send, 413, f"the body has more than {self._limit} bytes")
            return
        path, method = scope["path"], scope["method"]
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in HOP_BY_HOP]
        target = scope.get("raw_path", path.encode()).decode("latin-1")
        if method == "POST" and path in CARRIED:
            kinds = [v.decode("latin-1") for k, v in headers if k.lower() == b"content-type"]
            try:
                body = pack(path, body, kinds[0] if kinds else "")
            except ValueError as error:
                await refuse(send, 400, str(error))
                return
            target = ROUTE
            headers = [(k, v) for k, v in headers if k.lower() != b"content-type"]
            headers.append((b"content-type", b"application/json"))
        query = scope.get("query_string", b"").decode("latin-1")
        base = self._router
        if path in OF_A_SERVER:
            if not self._admits(headers):
                await refuse(send, 401, "this wants the API key, as Authorization: Bearer KEY")
                return
            base = await self._decode_server() or base
        elif path == METRICS:
            target = OF_ALL_SERVERS
        url = f"{base}{target}{'?' if query else ''}{query}"
        answer = asyncio.ensure_future(self._forward(method, url, headers, body, send))
        leaves = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait({answer, leaves}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            # Its connection to the router closes, and the router tells the servers.
            for task in (answer, leaves):
                task.cancel()
            await asyncio.gather(answer, leaves, return_exceptions=True)

    def _admits(self, headers: Headers) -> bool:
        if self._authorization is None:
            return True
        given = next((v for k, v in headers if k.lower() == b"authorization"), b"")
        return hmac.compare_digest(given, self._authorization)

    async def _decode_server(self) -> str:
        """One that the router has and takes for healthy, or ""."""
        now = time.monotonic()
        if now - self._looked < LOOK_AGAIN_S:
            return self._decode
        assert self._session is not None
        key = self._authorization
        names = {"authorization": key.decode("latin-1")} if key else {}
        try:
            async with self._session.get(f"{self._router}/workers", headers=names) as reply:
                found = (await reply.json())["workers"] if reply.status == 200 else []
        except (aiohttp.ClientError, ValueError, KeyError):
            return ""
        serving = [each for each in found if each.get("is_healthy")]
        decode = [each["url"] for each in serving if each.get("worker_type") == "decode"]
        self._decode, self._looked = (decode[0] if decode else ""), now
        return self._decode

    async def _read(self, receive: Any) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limit:
                return None
            if not message.get("more_body"):
                return b"".join(parts)

    async def _forward(
        self, method: str, url: str, headers: Headers, body: bytes, send: Any
    ) -> None:
        assert self._session is not None
        try:
            reply = await self._session.request(
                method, url, data=body or None, headers=decoded(headers), allow_redirects=False
            )
        except aiohttp.ClientError as error:
            await refuse(send, 503, f"the router does not answer: {error}")
            return
        async with reply:
            status, sent = restored(reply.status, reply.raw_headers)
            if url.partition("?")[0] == f"{self._router}{OF_ALL_SERVERS}":
                text = RENAMED.sub(rb"\1:", await reply.read())
                kept = [each for each in sent if each[0].lower() != b"content-length"]
                await send({"type": "http.response.start", "status": status, "headers": kept})
                await send({"type": "http.response.body", "body": text})
                return
            await send({"type": "http.response.start", "status": status, "headers": sent})
            async for chunk in reply.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body"})


def restored(status: int, headers: Iterable[tuple[bytes, bytes]]) -> tuple[int, Headers]:
    """An answer's status and headers as the server gave them."""
    given = [(k, v) for k, v in headers if k.lower() not in HOP_BY_HOP - {b"content-length"}]
    own = {name.lower(): value for name, value in given}
    hidden, kind = own.get(STATUS.encode()), own.get(CONTENT_TYPE.encode())
    ours = {STATUS.encode(), CONTENT_TYPE.encode()} | ({b"content-type"} if kind else set())
    kept = [(k, v) for k, v in given if k.lower() not in ours]
    if kind:
        kept.append((b"content-type", kind))
    return (int(hidden) if hidden else status), kept


def decoded(headers: Headers) -> list[tuple[str, str]]:
    """As aiohttp writes them, which is in UTF-8."""
    return [(name.decode("latin-1"), _value(value)) for name, value in headers]


def _value(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


async def left(receive: Any) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def refuse(send: Any, status: int, message: str) -> None:
    """As SGLang refuses."""
    error = {"object": "error", "message": message, "type": "BadRequestError", "code": status}
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
