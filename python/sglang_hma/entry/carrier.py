"""A client's request as SGLang's router carries it: whole, inside one that it understands.

The router reads a request into a type of its own and sends on what that type has. So the entry
hands it `/generate` requests with nothing of their own but what the router acts on (whether the
answer is a stream, how many rooms it takes), and with the client's bytes in
a field that it copies. The servers behind it take them out again.
"""

import json
from dataclasses import dataclass
from typing import Any

from sglang_hma.entry.rooms import rooms

CARRIED = ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
ROUTE = "/generate"  # of the carrier
FIELD, MARK = "session_params", "sglang_hma_request"
PATH, KIND = "path", "content_type"
BOOTSTRAP = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
# What the router would write anew: an answer's status below 500, and a stream's content type.
STATUS, CONTENT_TYPE = "x-hma-status", "x-hma-content-type"
MOST_ROOMS = 1024


@dataclass(frozen=True)
class Carried:
    """A client's request; `content_type` is "" for one that said none."""

    path: str
    body: bytes
    content_type: str


def pack(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """The router's request for a client's POST of `body` to `path`. Raises ValueError if the body
    is no UTF-8, or asks for more than MOST_ROOMS answers."""
    text = body.decode()
    asked = _object(text)
    carrier: dict[str, Any] = {FIELD: {MARK: text, PATH: path, KIND: content_type}}
    carrier["stream"] = asked.get("stream") is True
    count = rooms(path, asked)
    if count > MOST_ROOMS:
        raise ValueError(f"this asks for {count} answers at once, and {MOST_ROOMS} are the most")
    if count == 1:
        carrier["text"] = ""
    else:
        carrier["input_ids"] = [[0]] * count
    return json.dumps(carrier).encode()


def unpack(body: bytes) -> Carried | None:
    """The client's request, with the router's bootstrap fields added; None for a request that is no
    carrier."""
    if MARK.encode() not in body:
        return None
    outer = _object(body.decode(errors="replace"))
    carried = outer.get(FIELD)
    if not isinstance(carried, dict) or not isinstance(carried.get(MARK), str):
        return None
    path, kind = carried.get(PATH), carried.get(KIND)
    if path not in CARRIED or not isinstance(kind, str) or not kind.isprintable():
        return None
    fields = {name: outer[name] for name in BOOTSTRAP if name in outer}
    return Carried(path, _with_fields(carried[MARK], fields).encode(), kind)


def _object(text: str) -> dict[str, Any]:
    """Empty for what is no JSON object: the servers say so."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _with_fields(text: str, fields: dict[str, Any]) -> str:
    """A JSON object with these fields behind its own, which they outweigh. Other text as it is."""
    head = text.rstrip()
    if not fields or not head.endswith("}") or not _is_object(head):
        return text
    inside = head[:-1].rstrip()
    comma = "" if inside.lstrip() == "{" else ","
    return f"{inside}{comma}{json.dumps(fields)[1:]}"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
