"""A carried request (entry/carrier.py) becomes the client's own before SGLang sees it."""

from typing import Any

from sglang_hma.entry.carrier import CONTENT_TYPE, ROUTE, STATUS, unpack

# The router tries these again with another server.
TRIED_AGAIN = (408, 429)
OF_THE_CARRIER = (b"content-length", b"content-type")


class Unpacking:
    """ASGI middleware, outermost. Other requests pass as they are.

    SGLang's router replaces the body of a refusal, and a stream's content type. So refusals of a
    carried request travel as 200, with their status in a header that the entry reads.
    """

    def __init__(self, application: Any) -> None:
        self._application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_route = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == ROUTE
        if not is_route:
            await self._application(scope, receive, send)
            return
        body, more = await read(receive)
        carried = unpack(body) if more is None else None
        if carried is None:
            await self._application(scope, replay(body, receive, more), send)
            return
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in OF_THE_CARRIER]
        headers.append((b"content-length", b"%d" % len(carried.body)))
        if carried.content_type:
            headers.append((b"content-type", carried.content_type.encode("latin-1", "replace")))
        path = carried.path
        scope = scope | {"path": path, "raw_path": path.encode(), "headers": headers}
        await self._application(scope, replay(carried.body, receive), hides_refusals(send))


async def read(receive: Any) -> tuple[bytes, Any]:
    """A request's body, and the message that came in its place if the client has left."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts), message
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts), None


def replay(body: bytes, receive: Any, last: Any = None) -> Any:
    """`receive` with a body that was read; then `last`, or what comes."""
    messages = [last] if last is not None else []
    messages.insert(0, {"type": "http.request", "body": body, "more_body": last is not None})

    async def replayed() -> Any:
        return messages.pop(0) if messages else await receive()

    return replayed


def hides_refusals(send: Any) -> Any:
    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", ()))
            headers += [
                (CONTENT_TYPE.encode(), value)
                for name, value in headers
                if name.lower() == b"content-type"
            ]
            if 400 <= status < 500 and status not in TRIED_AGAIN:
                headers.append((STATUS.encode(), b"%d" % status))
                status = 200
            message = message | {"status": status, "headers": headers}
        await send(message)

    return sent
