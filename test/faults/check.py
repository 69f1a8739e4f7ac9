"""What must be true once the faults have ended."""

import time
from collections.abc import Callable

import requests

from ..e2e.client import DRAIN_S, Greedy, generate
from ..e2e.harness import POLL_S, Server
from .fleet import Fleet
from .load import Question

# Longer than decode keeps pages that a dead prefill server's connections may still reach (300 s).
PATIENCE_S = 420.0
EMPTY = ("sglang_hma:kv_quarantined_pages", "sglang_hma:kv_unsettled_rooms")


def within(seconds: float, what: Callable[[], str]) -> str:
    """Empty once `what` says nothing any more, else what it says after `seconds`."""
    end = time.monotonic() + seconds
    while words := _words(what):
        if time.monotonic() > end:
            return words
        time.sleep(POLL_S)
    return ""


def _words(what: Callable[[], str]) -> str:
    try:
        return what()
    except (requests.RequestException, AssertionError, ValueError) as error:
        return repr(error)[:300]


def healthy(fleet: Fleet) -> list[str]:
    """The launcher has all its programs, and each says that it serves."""
    wrong = []
    for name in fleet.names:
        wrong.append(within(PATIENCE_S, lambda name=name: _is_up(fleet, name)))
    wrong.append(within(PATIENCE_S, lambda: _answers(f"{fleet.url}/readiness")))
    return [words for words in wrong if words]


def _is_up(fleet: Fleet, name: str) -> str:
    if fleet.main(name) is None:
        return f"{name} is not there"
    url = fleet.server(name).url
    return _answers(f"{url}/health/live") or _answers(f"{url}/health")


def _answers(url: str) -> str:
    reply = requests.get(url, timeout=60)
    return "" if reply.status_code == 200 else f"{url}: {reply.status_code} {reply.text[:200]}"


def same_answers(fleet: Fleet, asked: list[Question], quiet: list[Greedy]) -> list[str]:
    """Each question once more; the first may find a router that does not know all servers yet."""
    wrong = []
    for each, expected in zip(asked, quiet, strict=True):
        found: list[int] = []

        def ask(each: Question = each, found: list[int] = found) -> str:
            found[:] = generate(fleet.url, each.prompt, each.tokens)["output_ids"]
            return ""

        words = within(PATIENCE_S, ask)
        if words or found != expected:
            wrong.append(words or f"{found} instead of {expected.tokens}")
    return wrong


def nothing_kept(fleet: Fleet) -> list[str]:
    """No request, no page, and nothing of a request that failed."""
    return [f"{name}: {words}" for name in fleet.names for words in _kept(fleet.server(name))]


def _kept(server: Server) -> list[str]:
    wrong = [
        within(PATIENCE_S, lambda metric=metric: _count(server.metric(metric), metric))
        for metric in EMPTY
    ]
    # SGLang empties its cache only when no request is left, its queues of transfers included.
    reply = requests.post(f"{server.url}/flush_cache", params={"timeout": DRAIN_S})
    wrong.append("" if reply.status_code == 200 else f"flush_cache: {reply.text[:300]}")
    wrong.append(within(60, lambda: _loads(server.url)))
    wrong.append(within(60, lambda: _buffers(server)))
    if "leak" in server.text().lower():
        wrong.append(f"{server.log} speaks of a leak")
    return [words for words in wrong if words]


def _count(value: float, name: str) -> str:
    return f"{name} is {value:g}" if value else ""


def _loads(url: str) -> str:
    reply = requests.get(f"{url}/v1/loads", params={"include": "all"}, timeout=60)
    (found,) = reply.json()["loads"]
    used = {
        k: found[k]
        for k in ("num_used_tokens", "num_running_reqs", "num_waiting_reqs")
        if found.get(k)
    }
    used |= {
        k: v for k, v in (found.get("disaggregation") or {}).items() if k.endswith("_reqs") and v
    }
    return str(used) if used else ""


def _buffers(server: Server) -> str:
    (state,) = server.info()["internal_states"]
    found = state["hma"]["metadata_buffers"]
    return f"{found} metadata buffers" if found["in_use"] else ""
