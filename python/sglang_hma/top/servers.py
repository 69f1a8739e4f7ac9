"""Which servers to ask: those that are named, and those that a router says it has."""

from urllib.parse import urlsplit

import msgspec

from sglang_hma.planner.live.fetch import Unheard, get

MAX_WORKERS = 256
REMEDY = "give http://HOST:PORT of a server, or of the router"


class Worker(msgspec.Struct):
    url: str


class Workers(msgspec.Struct):
    """A router's reply to /workers."""

    workers: list[Worker]


def base_url(text: str) -> str:
    """Without a path; http where no scheme is named. Raises Unheard for what names no server."""
    whole = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(whole)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
        named = parts.port or known
    except ValueError as error:
        raise Unheard(f"URL is {text!r} ({error}): {REMEDY}") from error
    if not (known and named) or parts.path.rstrip("/") not in ("", "/metrics") or parts.query:
        raise Unheard(f"URL is {text!r}: {REMEDY}")
    return f"{parts.scheme}://{parts.netloc}"


def workers_of(url: str, timeout_s: float) -> list[str] | None:
    """The servers of a router; None if it is no router. Raises Unheard."""
    status, body = get(f"{url}/workers", timeout_s=timeout_s)
    if status != 200:
        return None
    try:
        found = msgspec.json.decode(body, type=Workers).workers
        return [base_url(worker.url) for worker in found[:MAX_WORKERS]]
    except (msgspec.DecodeError, UnicodeDecodeError, Unheard) as error:
        raise Unheard(
            f"{url}: replies to /workers without a list of servers ({error}): give the URL of a "
            "server, or the one that the router serves on"
        ) from error
