"""Claims, and the lists that renew them: whatever is lost or late, the end state is right."""

import random
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer import leases
from sglang_hma.transfer.leases import Claims, Tenant
from sglang_hma.transfer.liveness import STRIKES, Address

A, B = ("10.0.0.1", 5001), ("10.0.0.2", 5002)


def test_claims_tell_waiting_from_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = Claims(expected=True)
    alive = socket.create_server(("127.0.0.1", 0))
    dead = socket.create_server(("127.0.0.1", 0))
    dead_address = dead.getsockname()[:2]
    dead.close()
    claims.claimed(1, dead_address)
    for room in (1, 2, 3, 4):
        claims.opened(room)
    claims.claimed(2, alive.getsockname()[:2])
    claims.closed(4)
    assert claims.hopeless() == []
    found: list[tuple[int, str]] = []
    deadline = time.monotonic() + STRIKES + 5
    while not found and time.monotonic() < deadline:
        found = claims.hopeless()
        time.sleep(0.05)
    host, port = dead_address
    assert found == [(1, f"its decode server {host}:{port} is gone")]
    monkeypatch.setattr(Claims, "UNCLAIMED_S", 0.0)
    assert [room for room, _ in claims.hopeless()] == [1, 3]
    claims.expected = False
    assert [room for room, _ in claims.hopeless()] == [1]
    alive.close()


def test_unclaimed_requests_end_soon_when_every_decode_server_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Claims, "ORPHANED_S", 0.0)
    claims = Claims(expected=True)
    claims.opened(1)
    assert claims.hopeless() == []  # no decode server has been heard of yet
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    for server in servers:
        claims.renewed([], server.getsockname()[:2])
    servers[0].close()
    deadline = time.monotonic() + STRIKES + 1
    while time.monotonic() < deadline:
        assert claims.hopeless() == []  # one still listens
        time.sleep(0.1)
    servers[1].close()
    wait_for(lambda: bool(claims.hopeless()))
    assert "all that were known are gone" in claims.hopeless()[0][1]


def test_requests_that_never_came_are_told_of_while_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claims = Claims(expected=True)
    for room in (1, 2, 3, 4):
        claims.claimed(room, A)
    claims.claimed(1, B)
    claims.opened(2)
    claims.opened(4)
    claims.closed(4)
    assert claims.unopened() == []
    monkeypatch.setattr(Claims, "UNOPENED_S", 0.05)
    time.sleep(0.1)
    assert sorted(claims.unopened()) == [(1, [A, B]), (3, [A])]
    assert claims.unopened() == []  # not again at once
    time.sleep(0.1)
    claims.renewed([1, 2], A)
    assert claims.unopened() == [(1, [A, B])]
    time.sleep(0.1)
    claims.renewed([], A)
    claims.renewed([], B)
    assert claims.unopened() == []
    assert not claims._by.keys() - {2}, "claims of requests that never came are forgotten"


def given_up(claims: Claims) -> set[int]:
    return {room for room, why in claims.hopeless() if "given it up" in why}


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
    for rank in (A, B):
        claims.renewed(sorted(held[rank]), rank)
    expected = {room for rank in (A, B) for room in heard[rank] - held[rank]}
    assert given_up(claims) == expected


def test_a_tenant_claims_renews_and_says_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.02)
    monkeypatch.setattr(leases, "LAST_WORDS_S", 0.1)
    said: list[tuple[str, Address, object]] = []
    tenant = Tenant(
        lambda rank, room: said.append(("claim", rank, room)),
        lambda rank, rooms: said.append(("held", rank, rooms)),
    )
    tenant.take(7, [A, B])
    tenant.take(8, [A])
    assert [entry for entry in said if entry[0] == "claim"] == [
        ("claim", A, 7),
        ("claim", B, 7),
        ("claim", A, 8),
    ]
    wait_for(lambda: ("held", A, [7, 8]) in said and ("held", B, [7]) in said)
    tenant.drop(7)
    wait_for(lambda: ("held", A, [8]) in said and ("held", B, []) in said)
    tenant.drop(8)
    wait_for(lambda: tenant._thread is None)  # nothing is left to say
    tenant.take(9, [B])
    wait_for(lambda: ("held", B, [9]) in said)
    tenant.drop(9)


def wait_for(condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_silence_ends_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = Claims(expected=True)
    listening = socket.create_server(("127.0.0.1", 0))
    address = listening.getsockname()[:2]
    claims.opened(1)
    claims.claimed(1, address)
    assert claims.hopeless() == []
    monkeypatch.setattr(Claims, "LEASE_S", 0.05)
    time.sleep(0.1)
    assert "not been heard of" in claims.hopeless()[0][1]
    claims.renewed([1], address)
    assert claims.hopeless() == []
    listening.close()


@given(st.integers(0, 2**32 - 1))
def test_a_claim_is_never_overtaken_by_an_older_list(seed: int) -> None:
    """What arrives at prefill, in order, never makes it give up a room that decode has."""
    rng = random.Random(seed)
    claims = Claims(expected=False)
    tenant = Tenant(
        lambda rank, room: claims.claimed(room, rank),
        lambda rank, rooms: claims.renewed(rooms, rank),
    )
    tenant._thread = object()  # type: ignore[assignment]  # lists are sent by hand below
    held: set[int] = set()
    for room in range(6):
        claims.opened(room)
    for _ in range(40):
        room = rng.randrange(6)
        step = rng.randrange(3)
        if step == 0:
            tenant.take(room, [A])
            held.add(room)
        elif step == 1:
            tenant.drop(room)
            held.discard(room)
        else:
            tenant._renew_all()
            tenant._thread = object()  # type: ignore[assignment]
        assert not given_up(claims) & held
