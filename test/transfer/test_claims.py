"""Claims, and the lists that renew them: whatever is lost or late, the end state is right."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer import claims as claims_module
from sglang_hma.transfer import liveness
from sglang_hma.transfer.claims import EMPTY_LISTS_S, RENEW_S, ClaimRenewer, Claims
from sglang_hma.transfer.early_claims import MAX_EARLY
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.messages import MAX_ROOMS

A, B = ("10.0.0.1", 5001), ("10.0.0.2", 5002)


class Clock:
    """Stands for the module `time` in claims.py: only the test lets time pass."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._asleep, self._wake = threading.Semaphore(0), threading.Semaphore(0)

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self._asleep.release()
        assert self._wake.acquire(timeout=600)

    def wake_sleeper(self, seconds: float) -> None:
        """Time passes until the one thread that sleeps wakes."""
        assert self._asleep.acquire(timeout=600)
        self.now_s += seconds
        self._wake.release()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(claims_module, "time", made)
    return made


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Two ports that listen; closed ones are found out quickly."""
    monkeypatch.setattr(liveness, "INTERVAL_S", 0.01)
    made = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    yield made
    for server in made:
        server.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_until_probed(claims: Claims, server: socket.socket) -> None:
    """Until the port was tried often enough to be found gone if it had refused."""
    server.settimeout(60)
    for _ in range(liveness.REFUSALS + 1):
        claims.lost()
        server.accept()[0].close()


def test_claims_tell_waiting_from_lost(clock: Clock, servers: list[socket.socket]) -> None:
    claims = Claims(expected=True)
    dead, alive = (server.getsockname()[:2] for server in servers)
    servers[0].close()
    claims.claimed(1, dead)
    for room in (1, 2, 3, 4):
        claims.opened(room)
    claims.claimed(2, alive)
    claims.closed(4)
    assert claims.lost() == []
    wait_for(lambda: claims.lost() != [])
    assert claims.lost() == [(1, f"its decode server {dead[0]}:{dead[1]} is gone")]
    clock.now_s += Claims.UNCLAIMED_S + 1
    claims.renewed([2], alive)
    assert [room for room, _ in claims.lost()] == [1, 3]
    claims.expected = False
    assert [room for room, _ in claims.lost()] == [1]


def test_unclaimed_requests_end_soon_when_every_decode_server_is_gone(
    clock: Clock, servers: list[socket.socket]
) -> None:
    claims = Claims(expected=True)
    claims.opened(1)
    clock.now_s += Claims.ORPHANED_S + 1
    assert claims.lost() == []  # no decode server has been heard of yet
    for server in servers:
        claims.renewed([], server.getsockname()[:2])
        server.close()
    wait_for(lambda: "all that were known are gone" in str(claims.lost()))


def test_requests_that_may_have_gone_to_a_dead_server_do_not_wait_for_the_others(
    clock: Clock, servers: list[socket.socket]
) -> None:
    """SGLang's router tries such a request again only when both servers have answered."""
    claims = Claims(expected=True)
    for server in servers:
        claims.renewed([], server.getsockname()[:2])
    claims.opened(1)
    clock.now_s += Claims.ORPHANED_S + 1
    wait_until_probed(claims, servers[1])
    assert claims.lost() == []
    host, port = servers[0].getsockname()[:2]
    servers[0].close()
    wait_for(lambda: claims.lost() != [])
    assert claims.lost() == [(1, f"no decode server claimed it, and {host}:{port} is gone")]
    clock.now_s += Claims.LATELY_S
    claims.opened(2)  # the router has long known that it is dead
    clock.now_s += Claims.ORPHANED_S + 1
    claims.closed(1)
    assert claims.lost() == []


def test_requests_that_never_came_are_told_of_while_they_are_wanted(clock: Clock) -> None:
    claims = Claims(expected=True)
    for room in (1, 2, 3, 4):
        claims.claimed(room, A)
    claims.claimed(1, B)
    claims.opened(2)
    claims.opened(4)
    claims.closed(4)
    assert claims.unopened() == []
    clock.now_s += Claims.UNOPENED_S + 1
    assert sorted(claims.unopened()) == [(1, [A, B]), (3, [A])]
    assert claims.unopened() == []  # not again at once
    clock.now_s += Claims.UNOPENED_S + 1
    claims.renewed([1, 2], A)
    assert claims.unopened() == [(1, [A, B])]
    clock.now_s += Claims.UNOPENED_S + 1
    claims.renewed([], A)
    claims.renewed([], B)
    assert claims.unopened() == []
    assert len(claims._early) == 0, "claims of requests that never came are forgotten"


def test_who_waits_for_a_refused_request_is_told_why(clock: Clock) -> None:
    claims = Claims(expected=True)
    claims.claimed(1, A)
    claims.opened(3)
    for room in (1, 2, 3):
        claims.refused(room, f"{room} is refused")
    assert claims.refusals() == [(1, [A], "1 is refused")]  # 3 is another's
    assert claims.refusals() == []
    claims.claimed(2, B)
    claims.renewed([1], A)  # it was not told
    claims.claimed(3, A)
    assert sorted(claims.refusals()) == [(1, [A], "1 is refused"), (2, [B], "2 is refused")]
    claims.renewed([], A)
    clock.now_s += Claims.UNOPENED_S + 1
    assert claims.refusals() == claims.unopened() == []
    for room in range(10, 10 + 2 * Claims.MAX_REFUSED):
        claims.refused(room, "")
    assert len(claims._refused) == Claims.MAX_REFUSED


def test_claims_of_a_server_that_has_died_are_forgotten(clock: Clock) -> None:
    """It sends no list that is without them. One that was only cut off claims them again."""
    claims = Claims(expected=True)
    claims.claimed(1, A)
    for _ in range(5):
        clock.now_s += Claims.UNOPENED_S + 1
        claims.unopened()
    assert len(claims._early) == 0
    claims.renewed([1], A)
    clock.now_s += Claims.UNOPENED_S + 1
    assert claims.unopened() == [(1, [A])]


def given_up(claims: Claims) -> set[int]:
    return {room for room, why in claims.lost() if "given it up" in why}


@given(st.integers(0, 2**32 - 1))
def test_the_next_list_that_arrives_settles_everything(seed: int) -> None:
    """Two decode ranks take and drop rooms, some of their messages are lost; then one list each."""
    rng = random.Random(seed)
    claims = Claims(expected=False)
    held: dict[Address, set[int]] = {A: set(), B: set()}
    heard: dict[Address, set[int]] = {A: set(), B: set()}
    for room in range(8):
        claims.opened(room)
    for _ in range(rng.randrange(30)):
        rank, room = rng.choice([A, B]), rng.randrange(8)
        if rng.random() < 0.6:
            held[rank].add(room)
            if rng.random() < 0.7:
                claims.claimed(room, rank)
                heard[rank].add(room)
        else:
            held[rank].discard(room)
        if rng.random() < 0.2:
            claims.renewed(sorted(held[rank]), rank)
            heard[rank] |= held[rank]  # a list claims what it names
    for rank in (A, B):
        claims.renewed(sorted(held[rank]), rank)
    heard = {rank: heard[rank] | held[rank] for rank in heard}
    expected = {room for rank in (A, B) for room in heard[rank] - held[rank]}
    assert given_up(claims) == expected


def test_claims_are_renewed_until_nobody_needs_them(clock: Clock) -> None:
    sent: list[tuple[str, Address, object]] = []

    def next_lists(seconds: float = RENEW_S) -> dict[Address, object]:
        """What the renewer's thread sends when it wakes next."""
        del sent[:]
        thread = renewer._thread
        clock.wake_sleeper(seconds)
        wait_for(lambda: clock._asleep._value > 0 or not thread.is_alive())  # type: ignore
        assert all(kind == "renewal" for kind, _, _ in sent)
        return {rank: rooms for _, rank, rooms in sent}

    renewer = ClaimRenewer(
        lambda rank, room: sent.append(("claim", rank, room)),
        lambda rank, rooms: sent.append(("renewal", rank, rooms)),
    )
    renewer.claim(7, [A, B])
    renewer.claim(8, [A])
    assert sent == [("claim", A, 7), ("claim", B, 7), ("claim", A, 8)]
    assert next_lists() == {A: [7, 8], B: [7]}
    renewer.drop(7)
    assert next_lists() == {A: [8], B: []}
    renewer.drop(8)
    assert next_lists() == {A: [], B: []}
    assert next_lists(EMPTY_LISTS_S) == {}
    assert renewer._thread is None  # nothing is left to say
    renewer.claim(9, [B])
    assert next_lists() == {B: [9]}
    renewer.drop(9)
    assert next_lists(EMPTY_LISTS_S + 1) == {}


def test_a_list_repairs_a_lost_claim(clock: Clock, servers: list[socket.socket]) -> None:
    claims = Claims(expected=True)
    address = servers[0].getsockname()[:2]
    claims.opened(1)
    clock.now_s += RENEW_S
    claims.renewed([1], address)
    clock.now_s += Claims.UNCLAIMED_S + 1
    claims.renewed([1], address)
    assert claims.lost() == []
    claims.renewed([], address)
    assert given_up(claims) == {1}


def forge(claims: Claims, number: int, address: Callable[[int], Address]) -> None:
    """Claims of rooms that nobody has, some of them by lists."""
    for i in range(number):
        claims.claimed(10**9 + i, address(i))
    claims.renewed([2 * 10**9 + i for i in range(MAX_ROOMS)], address(0))


@pytest.mark.parametrize("addresses", [1, 2 * MAX_ROOMS])
def test_a_flood_of_forged_claims_changes_nothing_for_others(
    clock: Clock, servers: list[socket.socket], addresses: int
) -> None:
    claims = Claims(expected=True)
    decode = servers[0].getsockname()[:2]
    claims.claimed(1, decode)
    claims.opened(1)
    claims.opened(2)
    claims.claimed(2, decode)
    claims.claimed(3, decode)  # its other half never comes
    claims.claimed(4, decode)  # its other half comes late

    forge(claims, 2 * MAX_ROOMS, lambda i: (f"10.1.{i % addresses}", 1 + i % 7))
    assert len(claims._early) <= MAX_EARLY
    assert len(claims._heard_s) <= 4 * Claims.MAX_CLAIMANTS
    claims.opened(4)
    claims.opened(5)  # while the flood goes on
    claims.claimed(5, decode)
    clock.now_s += Claims.UNOPENED_S + 1
    claims.renewed([1, 2, 3, 4, 5], decode)
    assert claims.lost() == []
    assert (3, [decode]) in claims.unopened()
    claims.renewed([3], decode)
    assert given_up(claims) == {1, 2, 4, 5}


def test_a_flood_in_a_decode_servers_name_is_repaired_by_its_next_list(
    clock: Clock, servers: list[socket.socket]
) -> None:
    claims = Claims(expected=True)
    decode = servers[0].getsockname()[:2]
    claims.claimed(1, decode)
    claims.opened(2)
    claims.claimed(2, decode)
    for i in range(MAX_EARLY):
        claims.claimed(10**9 + i, decode)
    claims.opened(1)
    claims.renewed([1, 2], decode)
    clock.now_s += Claims.UNCLAIMED_S + 1
    claims.renewed([1, 2], decode)
    assert claims.lost() == [] and len(claims._early) <= MAX_EARLY


def test_one_request_has_no_more_claimants_than_a_server_has_ranks(clock: Clock) -> None:
    claims = Claims(expected=True)
    claims.opened(1)
    for i in range(2 * Claims.MAX_CLAIMANTS):
        claims.claimed(1, (f"10.1.{i}", 1))
    assert len(claims._claimants[1]) == Claims.MAX_CLAIMANTS


def test_requests_with_one_half_are_counted() -> None:
    claims = Claims(expected=True)
    claims.opened(1)
    claims.claimed(2, A)
    assert (claims.count_unclaimed(), claims.count_unopened()) == (1, 1)
    claims.claimed(1, A)
    claims.opened(2)
    assert (claims.count_unclaimed(), claims.count_unopened()) == (0, 0)
    claims.closed(1)
    claims.opened(3)
    claims.closed(3)
    assert (claims.count_unclaimed(), claims.count_unopened()) == (0, 0)
    stock = Claims(expected=False)
    stock.opened(1)
    assert stock.count_unclaimed() == 0


def test_silence_ends_the_lease(clock: Clock, servers: list[socket.socket]) -> None:
    claims = Claims(expected=True)
    address = servers[0].getsockname()[:2]
    claims.opened(1)
    claims.claimed(1, address)
    assert claims.lost() == []
    clock.now_s += Claims.LEASE_S + 1
    assert "not been heard of" in claims.lost()[0][1]
    claims.renewed([1], address)
    assert claims.lost() == []


@given(st.integers(0, 2**32 - 1))
def test_a_claim_is_never_overtaken_by_an_older_list(seed: int) -> None:
    """What arrives at prefill, in order, never makes it give up a room that decode has."""
    rng = random.Random(seed)
    claims = Claims(expected=False)
    renewer = ClaimRenewer(
        lambda rank, room: claims.claimed(room, rank),
        lambda rank, rooms: claims.renewed(rooms, rank),
    )
    renewer._thread = object()  # type: ignore[assignment]  # lists are sent by hand below
    held: set[int] = set()
    for room in range(6):
        claims.opened(room)
    for _ in range(40):
        room = rng.randrange(6)
        step = rng.randrange(3)
        if step == 0:
            renewer.claim(room, [A])
            held.add(room)
        elif step == 1:
            renewer.drop(room)
            held.discard(room)
        else:
            renewer._renew_all()
            renewer._thread = object()  # type: ignore[assignment]
        assert not given_up(claims) & held
