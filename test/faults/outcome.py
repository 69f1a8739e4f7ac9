"""What became of one request, as its client sees it."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from ..e2e.client import Greedy

Kind = Literal[
    "answered",
    "refused",  # an HTTP status of 4xx or 5xx, or an abort, with words
    "cut",  # the connection ended before the answer did, and shows it
    "truncated",  # looks complete and is not
    "wrong",  # other tokens than in the quiet run
    "wordless",  # refused without a reason
    "hung",  # neither an answer nor an error in the time that a client waits
]
FAULTS: tuple[Kind, ...] = ("truncated", "wrong", "wordless", "hung")
DONE = b"data: [DONE]"


@dataclass(frozen=True)
class Outcome:
    kind: Kind
    words: str = ""
    began_s: float = 0.0
    ended_s: float = 0.0
    streams: bool = False

    @property
    def lasted_s(self) -> float:
        return self.ended_s - self.began_s


@dataclass
class Reply:
    """What came of an HTTP request: `error` is the client library's, of the connection."""

    status: int = 0
    body: bytes = b""
    error: str = ""
    timed_out: bool = False


def judge(reply: Reply, streams: bool, expected: Greedy) -> tuple[Kind, str]:
    """The kind of outcome, and the words that go with it."""
    if reply.timed_out:
        return "hung", f"status {reply.status}, {len(reply.body)} bytes"
    if reply.status >= 400:
        text = reply.body.decode(errors="replace").strip()
        return ("refused", f"{reply.status} {text}") if text else ("wordless", str(reply.status))
    if streams:
        return _judge_stream(reply, expected)
    if reply.error:
        return "cut", reply.error
    try:
        found = json.loads(reply.body)
    except ValueError:
        return "truncated", f"HTTP {reply.status} with half a body: {reply.body[-80:]!r}"
    return _judge_answer(found, expected)


def _judge_stream(reply: Reply, expected: Greedy) -> tuple[Kind, str]:
    lines = [line for line in reply.body.split(b"\n") if line.strip()]
    if lines and lines[-1] == DONE:
        lines.pop()
    elif reply.error or not lines:
        return "cut", reply.error or "an empty stream"
    else:
        # Whoever reads until the connection ends takes this for the whole answer, unless the last
        # event says otherwise.
        last = _event(lines[-1])
        if last is None or "error" not in last:
            return "truncated", f"ends without [DONE] after {len(lines)} events"
    last = _event(lines[-1]) if lines else None
    if last is None:
        return "truncated", "[DONE] without an event"
    if "error" in last:
        return ("refused", str(last["error"])) if last["error"] else ("wordless", "an empty error")
    return _judge_answer(last, expected)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.removeprefix(b"data: "))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _judge_answer(found: dict[str, Any], expected: Greedy) -> tuple[Kind, str]:
    reason = found.get("meta_info", {}).get("finish_reason") or {}
    if reason.get("type") == "abort":
        words = str(reason.get("message") or "")
        return ("refused", words) if words else ("wordless", "an abort")
    tokens = found.get("output_ids", [])
    if len(tokens) != len(expected.tokens) or not reason:
        return "truncated", f"{len(tokens)} of {len(expected.tokens)} tokens, {reason or 'no end'}"
    if tokens != expected:
        return "wrong", f"{tokens} instead of {expected.tokens}, of which {expected.sure} are sure"
    return "answered", ""
