"""Replies over HTTP from machines that are not trusted to be well."""

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from urllib.parse import urlencode, urlsplit

from sglang_hma.planner.problem import Problem

TIMEOUT_S = 20.0
LIMIT_BYTES = 64 << 20
SHOWN = 200

# Servers are near: proxies of the environment are not asked.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Unheard(Problem):
    """One line: the URL, what it said or did not say, and the remedy."""


def get(
    url: str,
    params: Mapping[str, str] | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    limit_bytes: int = LIMIT_BYTES,
) -> tuple[int, bytes]:
    """Status and body of a GET.

    Raises Unheard: no http URL, no reply, one that is not there in full after `timeout_s`, or one
    longer than `limit_bytes`.
    """
    deadline = time.monotonic() + timeout_s
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Unheard(f"{url}: needs http://HOST:PORT")
        whole = f"{url}?{urlencode(params)}" if params else url
        try:
            reply = _direct.open(whole, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            return reply.status, _body(url, reply, deadline, limit_bytes)
    except Unheard:
        raise
    except (OSError, HTTPException, ValueError) as error:
        why = getattr(error, "reason", error)
        if isinstance(why, TimeoutError):
            raise Unheard(f"{url}: no whole reply within {timeout_s:g} s") from None
        said = " ".join(str(why).split())[:SHOWN] or type(error).__name__
        raise Unheard(f"{url}: {said}") from error


def _body(url: str, reply: HTTPResponse, deadline: float, limit_bytes: int) -> bytes:
    """Read as it comes, so that a body in drops meets the deadline too."""
    body = bytearray()
    while part := reply.read1(1 << 16):
        body += part
        if len(body) > limit_bytes:
            raise Unheard(f"{url}: replies with more than {limit_bytes} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if reply.length:
        raise HTTPException(f"its reply ends {reply.length} bytes early")
    return bytes(body)


def shown(body: bytes) -> str:
    """The beginning of a body, in one line."""
    return " ".join(body[:SHOWN].decode(errors="replace").split())
