"""What decode said of requests that never began on prefill is kept for a while, not for ever."""

import random

from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer.prefill.strays import KEPT_S, MAX_KEPT, Strays


def test_rooms_are_kept_for_a_while() -> None:
    strays = Strays()
    assert strays.overdue({1, 2}, 100.0) == []
    assert strays.overdue({1, 3}, 100.0 + KEPT_S) == []  # 2 has begun here
    assert strays.overdue({1, 2, 3}, 101.0 + KEPT_S) == [1]
    assert strays.overdue({2, 3}, 102.0 + 2 * KEPT_S) == [3, 2]


def test_a_flood_is_bounded_and_pushes_out_the_oldest() -> None:
    strays = Strays()
    assert strays.overdue({1, 2}, 0.0) == []
    flood = set(range(10, 10 + MAX_KEPT))
    assert set(strays.overdue({1, 2} | flood, 1.0)) == {1, 2}


@given(st.integers(0, 2**32 - 1))
def test_none_is_kept_longer_and_none_shorter(seed: int) -> None:
    rng = random.Random(seed)
    strays, since, now = Strays(), {}, 0.0
    for _ in range(30):
        now += rng.uniform(0, KEPT_S / 4)
        rooms = {room for room in range(6) if rng.random() < 0.9}
        since = {room: since.get(room, now) for room in rooms}
        found = set(strays.overdue(rooms, now))
        assert found == {room for room in rooms if now - since[room] > KEPT_S}
