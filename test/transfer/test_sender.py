"""Sender and receiver together: pages arrive verified, or the request fails with the reason."""

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer import messages
from sglang_hma.transfer.integrity import MAX_RESENDS
from sglang_hma.transfer.prefill import sender
from sglang_hma.transfer.prefill.jobs import EarlySend
from sglang_hma.transfer.tcp_table import Connection

from .two_servers import LAYERS, PAGES, ROWS, SESSION, WINDOW_PAGES, Servers


@pytest.fixture(autouse=True)
def config(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HmaConfig(role="prefill").environment().items():
        monkeypatch.setenv(name, value)


class Request:
    """One request: its pages on both sides, and the events that send it."""

    def __init__(
        self,
        servers: Servers,
        room: int,
        source: list[int],
        target: list[int],
        window: tuple[list[int], list[int]] | None = None,
    ) -> None:
        """`window`: pages of the last window, here and there."""
        self.servers, self.room = servers, room
        self.source, self.target = (np.array(ids, dtype=np.int32) for ids in (source, target))
        self.window = [np.array(ids, dtype=np.int32) for ids in window or ()]
        self.destination = servers.start(room, target, window[1] if window else None)
        self.gate = LayerGate(LAYERS)
        self.row = room % ROWS

    def add(self, part: slice, early: EarlySend | None, row: int | None) -> None:
        self.servers.sender.add(
            self.room,
            self.source[part],
            part,
            early=early,
            metadata_row=row,
            destinations=[self.destination],
            window=self.window[0] if self.window and row is not None else None,
        )

    def events(self) -> list[Callable[[], None]]:
        """Some pages leave early, behind a gate; the others with the last send."""
        cut, pages = self.servers.rng.randrange(len(self.source)), len(self.source)
        events: list[Callable[[], None]] = []
        if cut:
            early = EarlySend(self.gate, self.gate)
            events.append(lambda: self.add(slice(0, cut), early, None))
            events += [partial(self.gate.advance, layer) for layer in range(LAYERS)]
        events.append(self.gate.finish)
        events.append(lambda: self.add(slice(cut, pages), None, self.row))
        return events

    def landed(self) -> bool:
        prefill, decode = self.servers.prefill, self.servers.decode
        pages = np.array_equal(decode.pages[:, self.target], prefill.pages[:, self.source])
        windows = not self.window or np.array_equal(
            decode.window[:, self.window[1]], prefill.window[:, self.window[0]]
        )
        rows = np.array_equal(decode.rows[self.destination.row], prefill.rows[self.row])
        return pages and windows and rows


def requests(servers: Servers, rooms: int) -> list[Request]:
    """Of random length, with pages of their own."""
    ids = [servers.rng.sample(range(PAGES), PAGES) for _ in range(2)]
    windows = [servers.rng.sample(range(1, WINDOW_PAGES), WINDOW_PAGES - 1) for _ in range(2)]
    made = []
    for room in range(rooms):
        pages = servers.rng.randrange(1, PAGES // rooms + 1)
        source, target = ([side.pop() for _ in range(pages)] for side in ids)
        seen = servers.rng.randrange(1, min(pages, (WINDOW_PAGES - 1) // rooms) + 1)
        here, there = ([side.pop() for _ in range(seen)] for side in windows)
        window = (here, there) if servers.kinds > 1 else None
        made.append(Request(servers, room, source, target, window))
    return made


def assert_settled(servers: Servers) -> None:
    assert not servers.sender.requests and not servers.outstanding


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.booleans(), st.integers(1, 2))
def test_requests_arrive_whole_and_nothing_else_changes(
    seed: int, rooms: int, checksums: bool, kinds: int
) -> None:
    servers = Servers(seed, checksums=checksums, kinds=kinds)
    made = requests(servers, rooms)
    before, before_window = servers.decode.pages.copy(), servers.decode.window.copy()
    queues = [one.events() for one in made]
    events = []
    while any(queues):
        events.append(servers.rng.choice([queue for queue in queues if queue]).pop(0))
    servers.run(events)
    assert set(servers.sent_status.values()) == set(servers.got_status.values()) == {"succeeded"}
    assert all(one.landed() for one in made)
    untouched = np.setdiff1d(np.arange(PAGES), np.concatenate([one.target for one in made]))
    assert np.array_equal(servers.decode.pages[:, untouched], before[:, untouched])
    written = np.concatenate(
        [np.empty(0, np.int32), *(one.window[-1] for one in made if one.window)]
    )
    untouched = np.setdiff1d(np.arange(WINDOW_PAGES), written)
    assert np.array_equal(servers.decode.window[:, untouched], before_window[:, untouched])
    assert_settled(servers)


def test_a_request_ends_when_decode_has_verified_its_pages(seed: int) -> None:
    servers = Servers(seed)
    (one,) = requests(servers, 1)
    one.add(slice(0, len(one.source)), None, one.row)
    while servers.got_status[0] == "waiting":
        assert servers.sent_status[0] == "sending"
        servers.sender.thread.step()
        if servers.wire:
            servers.wire.popleft()()
    assert servers.sent_status[0] == "sending"  # the confirmation is still on its way
    servers.run()
    assert servers.sent_status[0] == "succeeded"
    assert_settled(servers)


def test_nothing_is_sent_again_after_a_success(seed: int) -> None:
    """The scheduler may have given the pages to another request, even if an earlier range that was
    sent again has not been acknowledged yet."""
    servers = Servers(seed)
    (one,) = requests(servers, 1)
    one.add(slice(0, len(one.source)), None, one.row)
    generation = one.destination.generation
    assert generation is not None
    while servers.got_status[0] == "waiting":
        servers.sender.thread.step()
        if servers.wire:
            servers.wire.popleft()()
    servers.add_sends(0, 1)
    servers.sender.on_message(messages.Verified(0, generation, SESSION))
    assert servers.sent_status[0] == "succeeded"
    submitted = servers.link.handles
    late = messages.Resend(0, generation, SESSION, 0, 1, 0, 1, attempt=1)
    servers.sender.on_message(late)
    assert not servers.sender.thread.step() and servers.link.handles == submitted


def test_a_range_is_sent_again_once_for_each_question(seed: int) -> None:
    """A second copy of a write would still be on its way when decode has verified the first."""
    servers = Servers(seed)
    (one,) = requests(servers, 1)
    one.add(slice(0, len(one.source)), None, one.row)
    while servers.link.running or servers.sender.thread.step():
        servers.sender.thread.step()
    generation = one.destination.generation
    asked = messages.Resend(0, generation, SESSION, 0, LAYERS, 0, len(one.source), attempt=1)
    again = msgspec.structs.replace(asked, attempt=2)
    for question, jobs in ((asked, 1), (asked, 1), (again, 2), (asked, 2), (again, 2)):
        servers.sender.on_message(question)
        assert servers.sends(0) == jobs


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("lasting", [False, True])
def test_wrong_bytes_are_sent_again_but_not_for_ever(seed: int, lasting: bool, kinds: int) -> None:
    servers = Servers(seed, kinds=kinds)
    (one,) = requests(servers, 1)
    servers.link.flips = True
    compared = servers.receiver.verifier.compare

    def compare(*args: Any) -> messages.Resend | None:
        resend = compared(*args)
        servers.link.flips = lasting
        return resend

    servers.receiver.verifier.compare = compare  # type: ignore[method-assign]
    servers.run([lambda: one.add(slice(0, len(one.source)), None, one.row)])
    if lasting:
        assert servers.got_status[0] == "failed"
        assert f"arrived with wrong bytes {MAX_RESENDS + 1} times" in servers.reasons[0]
    else:
        assert servers.got_status[0] == servers.sent_status[0] == "succeeded" and one.landed()
    servers.sender.on_tick()
    assert_settled(servers)


def test_a_wrong_first_token_fails_its_request(seed: int) -> None:
    """It and its logprobs travel beside the pages, in rows of their own."""
    servers = Servers(seed)
    (one,) = requests(servers, 1)
    servers.link.flips_rows = True
    servers.run(one.events())
    assert servers.got_status[0] == "failed"
    assert servers.reasons[0] == "the first token arrived with wrong bytes"
    servers.sender.on_tick()
    assert_settled(servers)


@pytest.mark.parametrize("aborted", [False, True])
def test_a_failed_write_fails_its_request_and_decode_keeps_the_pages(
    seed: int, monkeypatch: pytest.MonkeyPatch, aborted: bool
) -> None:
    """Also where the request was given up while the write was on its way."""
    servers = Servers(seed)
    (one,) = requests(servers, 1)
    one.add(slice(0, len(one.source)), EarlySend(one.gate, one.gate), None)
    one.gate.advance(0)
    servers.link.fails = servers.link.silent = True
    while not servers.link.running:
        servers.sender.thread.step()
    if aborted:
        servers.sent_status[0] = "failed"
    servers.link.silent = False
    table = [held("10.0.0.2", unacked=1), held("10.0.0.3", unacked=1)]
    monkeypatch.setattr(sender, "connections", lambda: table)
    monkeypatch.setattr(sender, "NETWORK_S", 0.0)
    servers.run([one.gate.finish])
    servers.sender.on_tick()
    assert servers.sent_status[0] == "failed"
    assert servers.got_status[0] == ("waiting" if aborted else "failed")
    if not aborted:
        assert servers.reasons[0] == f"a write to decode server {SESSION} failed"
        assert SESSION in servers.suspects
    assert servers.drained == [], "the kernel still holds bytes of the failed write"
    table[0] = held("10.0.0.2", unacked=0)
    servers.sender.on_tick()
    assert 0 in servers.drained
    assert_settled(servers)


def held(peer: str, *, unacked: int) -> Connection:
    """A connection of this host."""
    return Connection(("10.0.0.1", 40000), (peer, 16000), 1, unacked, 0, 7)


def test_a_failed_forward_pass_fails_its_request(seed: int) -> None:
    servers = Servers(seed)
    doomed, fine = requests(servers, 2)
    servers.run(
        [
            lambda: doomed.add(slice(0, 1), EarlySend(doomed.gate, doomed.gate), None),
            *fine.events(),
            lambda: doomed.gate.fail("the forward pass failed: out of memory"),
        ]
    )
    servers.sender.on_tick()
    assert servers.got_status == {0: "failed", 1: "succeeded"} and fine.landed()
    assert servers.reasons[0] == "the forward pass failed: out of memory"
    assert_settled(servers)


def test_too_few_reserved_pages_are_refused(seed: int) -> None:
    servers = Servers(seed)
    one = Request(servers, 0, [4, 5, 6], [1, 2])
    servers.run([lambda: one.add(slice(0, 3), None, 0)])
    servers.sender.on_tick()
    assert servers.reasons[0] == "decode reserved 2 pages, too few for the prompt"
    assert_settled(servers)


@pytest.mark.parametrize(
    ("window", "words"),
    [
        (([4, 5], [1]), "decode reserved 1 pages for a window of 2"),
        (([4], [1, 2]), "decode reserved 2 pages for a window of 1"),
        (([4, 0], [1, 2]), "a page of the prompt's last window was freed before it was sent"),
    ],
)
def test_another_window_than_decode_has_reserved_is_refused(
    seed: int, window: tuple[list[int], list[int]], words: str
) -> None:
    servers = Servers(seed, kinds=2)
    one = Request(servers, 0, [4, 5, 6], [1, 2, 3], window)
    before = servers.decode.window.copy()
    servers.run([lambda: one.add(slice(0, 3), None, 0)])
    servers.sender.on_tick()
    assert servers.reasons[0] == words and np.array_equal(servers.decode.window, before)
    assert_settled(servers)


@pytest.mark.parametrize(("kinds", "kind"), [(1, 1), (2, 1)])
def test_decode_cannot_ask_for_windows_of_others(seed: int, kinds: int, kind: int) -> None:
    """Where there is one pool, and before the window was sent."""
    servers = Servers(seed, kinds=kinds)
    one = Request(servers, 0, [4, 5, 6], [1, 2, 3], ([4], [1]))
    one.add(slice(0, 2), EarlySend(one.gate, one.gate), None)
    generation = one.destination.generation
    servers.sender.on_message(messages.Resend(0, generation, SESSION, 0, 1, 0, 1, 1, kind))
    servers.run([one.gate.finish])
    assert servers.reasons[0].startswith("decode asked again for pages")
    servers.sender.on_tick()
    assert_settled(servers)


@pytest.mark.parametrize(
    ("layers", "pages"), [((2, 2), (0, 1)), ((0, 1), (1, 3)), ((0, 1), (2, 1))]
)
def test_decode_cannot_ask_for_pages_of_others(
    seed: int, layers: tuple[int, int], pages: tuple[int, int]
) -> None:
    """Layers that do not exist, pages behind the request's last, pages that were not sent yet."""
    servers = Servers(seed)
    one = Request(servers, 0, [4, 5, 6], [1, 2, 3])
    one.add(slice(0, 2), EarlySend(one.gate, one.gate), None)
    generation = one.destination.generation
    resend = messages.Resend(0, generation, SESSION, *layers, *pages, attempt=1)
    servers.sender.on_message(msgspec.structs.replace(resend, generation=generation + 1))
    servers.sender.on_message(msgspec.structs.replace(resend, session="10.0.0.3:15001"))
    assert servers.sent_status[0] == "sending"
    servers.sender.on_message(resend)
    assert servers.sent_status[0] == "failed"
    servers.run([one.gate.finish])
    assert servers.reasons[0] == "decode asked again for pages that it has no claim to"
    servers.sender.on_tick()
    assert_settled(servers)
