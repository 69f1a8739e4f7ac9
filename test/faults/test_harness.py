"""The fault harness itself: what it draws, and what it takes for an outcome."""

import json
from typing import Any

import pytest

from ..e2e.client import Greedy
from .memory import MB, Sample, growth, slope
from .outcome import FAULTS, Reply, judge
from .schedule import EVERYWHERE, WEIGHTS, schedule

SERVERS = ("prefill-0", "prefill-1", "decode-0")
EXPECTED = Greedy([5, 6, 7, 8], sure=3)
LENGTH = {"type": "length", "length": 4}


def body(ids: list[int], reason: Any = LENGTH) -> bytes:
    return json.dumps({"output_ids": ids, "meta_info": {"finish_reason": reason}}).encode()


def events(*bodies: bytes, done: bool = True) -> bytes:
    sent = [b"data: " + each + b"\n\n" for each in bodies]
    return b"".join(sent) + (b"data: [DONE]\n\n" if done else b"")


@pytest.mark.parametrize(
    "reply, kind",
    [
        (Reply(200, body([5, 6, 7, 8])), "answered"),
        (Reply(200, body([5, 6, 7, 9])), "answered"),  # behind a tie
        (Reply(200, body([5, 6, 1, 8])), "wrong"),
        (Reply(200, body([5, 6, 7])), "truncated"),
        (Reply(200, body([5, 6, 7, 8], None)), "truncated"),
        (Reply(200, body([5, 6, 7, 8])[:-9]), "truncated"),
        (Reply(200, body([5, 6, 7, 8])[:-9], error="payload"), "cut"),
        (Reply(200, body([5], {"type": "abort", "message": "it died"})), "refused"),
        (Reply(200, body([5], {"type": "abort"})), "wordless"),
        (Reply(503, b"no server"), "refused"),
        (Reply(502, b""), "wordless"),
        (Reply(error="refused"), "cut"),
        (Reply(200, timed_out=True), "hung"),
    ],
)
def test_a_whole_answer(reply: Reply, kind: str) -> None:
    assert judge(reply, False, EXPECTED)[0] == kind


@pytest.mark.parametrize(
    "reply, kind",
    [
        (Reply(200, events(body([5], None), body([5, 6, 7, 8]))), "answered"),
        (Reply(200, events(body([5], None), body([5, 6, 7], None))), "truncated"),
        (Reply(200, events(body([5, 6, 7, 8]), done=False)), "truncated"),
        (Reply(200, events(body([5], None), done=False)), "truncated"),
        (Reply(200, events(body([5], None), done=False), error="payload"), "cut"),
        (Reply(200, b""), "cut"),
        (Reply(200, events()), "truncated"),
        (Reply(200, events(body([5], None), b'{"error": {"message": "died"}}')), "refused"),
        (Reply(200, events(b'{"error": {"message": "died"}}', done=False)), "refused"),
        (Reply(200, events(body([5, 6, 1, 8]))), "wrong"),
    ],
)
def test_a_stream(reply: Reply, kind: str) -> None:
    assert judge(reply, True, EXPECTED)[0] == kind


def test_a_seed_is_a_schedule() -> None:
    drawn = schedule(7, 3600, SERVERS)
    assert drawn == schedule(7, 3600, SERVERS) != schedule(8, 3600, SERVERS)
    assert {fault.kind for fault in drawn} == set(WEIGHTS)
    assert all((fault.server == "") == (fault.kind in EVERYWHERE) for fault in drawn)
    assert [fault for fault in drawn if fault.at_s < 600] == schedule(7, 600, SERVERS)
    without = schedule(7, 3600, SERVERS, without=("full-disk",))
    assert without == [fault for fault in drawn if fault.kind != "full-disk"]
    assert set(FAULTS).isdisjoint({"answered", "refused", "cut"})


def test_growth_is_of_a_process_that_has_settled() -> None:
    old, young = (1, "scheduler"), (2, "router")
    samples = [Sample(i, 100 * i, {old: int((100 + 0.2 * i) * MB)}) for i in range(100)]
    for each in samples[95:]:
        each.rss[young] = int(each.time_s * MB)
    assert slope(samples, old) == pytest.approx(2.0)
    assert growth(samples, old, settled_s=50) == pytest.approx(0.2 * 47)
    assert growth(samples, young, settled_s=50) == 0.0


def test_growth_leaves_out_what_a_server_takes_until_it_serves() -> None:
    """However long that takes: on a busy machine it is minutes."""
    who = (3, "prefill-1 main")
    samples = [Sample(i, i, {}, {"prefill-1": 1 + (i >= 120)}) for i in range(240)]
    for each in samples[20:]:
        loaded = min(each.time_s, 115)
        each.rss[who] = int((10 * loaded + 0.1 * each.time_s) * MB)
    assert growth(samples, who, settled_s=50) == pytest.approx(0.1 * (238 - 171))
    assert growth(samples[:120], who, settled_s=50) == 0.0
