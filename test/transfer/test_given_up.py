"""What decode refuses by itself, prefill gives up at once."""

import threading
from typing import Any

import pytest
from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_hma.transfer.decode.manager import MOST_GIVING_UP
from sglang_hma.transfer.refusals import GIVEN_UP, place_of, prepare_abort_on_prefill
from sglang_hma.transfer.request_fields import Peers

from .real_managers import Pair, until


class Request:
    def __init__(self, **fields: Any) -> None:
        self.bootstrap_room, self.bootstrap_host, self.bootstrap_port = 7, "::1", 8998
        vars(self).update(fields)


@pytest.mark.parametrize("known", [False, True])
def test_prefill_gives_a_room_up(managers: Pair, known: bool) -> None:
    if known:
        managers.transfer(next(managers.rooms), [1, 2], [1, 2])
    room = next(managers.rooms)
    sender = managers.sender(room)
    managers.decode.give_up(room, managers.bootstrap)
    until(lambda: sender.poll() == KVPoll.Failed)
    with pytest.raises(Exception, match=GIVEN_UP):
        sender.failure_exception()
    managers.transfer(next(managers.rooms), [1, 2], [1, 2])


@pytest.mark.parametrize("address", ["2.2.2.2:8998", "[::2]:1"])
def test_strangers_are_not_told(
    managers: Pair, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(managers.decode, "_peers", Peers([managers.bootstrap]))
    monkeypatch.setattr(threading, "Thread", None)
    managers.decode.give_up(next(managers.rooms), address)


def test_nobody_is_told_while_many_are(managers: Pair) -> None:
    gate = managers.decode._giving_up
    taken = 0
    while gate.acquire(blocking=False):
        taken += 1
    assert 0 < taken <= MOST_GIVING_UP
    managers.decode.give_up(next(managers.rooms), managers.bootstrap)
    for _ in range(taken):
        gate.release()


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({}, "7@[::1]:8998"),
        ({"bootstrap_host": "A.example"}, "7@a.example:8998"),
        ({"bootstrap_host": "no host"}, None),
        ({"bootstrap_host": None}, None),
        ({"bootstrap_host": ["a"]}, None),
        ({"bootstrap_port": None}, None),
        ({"bootstrap_port": True}, None),
        ({"bootstrap_room": "7"}, None),
        ({"bootstrap_room": True}, None),
    ],
)
def test_places(fields: dict[str, Any], place: str | None) -> None:
    assert place_of(Request(**fields)) == place


@pytest.mark.parametrize(("message", "status"), [(f"x: {GIVEN_UP}", 400), ("x", 500)])
def test_the_answer_of_what_was_given_up(message: str, status: int) -> None:
    said: list[Any] = []

    def original(req: Any, words: str, status_code: Any) -> None:
        said.append((words, status_code))

    prepare_abort_on_prefill(original, None, message, status_code=500)
    assert said == [(message, status)]


def test_an_embedding_has_no_other_half() -> None:
    assert place_of(object()) is None
