"""Flows on shared links against closed forms, and against a simulation in small slices of time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.planner.simulation.clock import Clock
from sglang_hma.planner.simulation.network import Link, Network


def ends(flows: list[tuple[float, float]], bytes_s: float) -> list[float]:
    """When flows of (begin, bytes) over one link end."""
    clock, link, found = Clock(), Link(bytes_s), [0.0] * len(flows)
    network = Network(clock)
    for index, (begin, size) in enumerate(flows):

        def start(index: int = index, size: float = size) -> None:
            network.send((link,), size, lambda: found.__setitem__(index, clock.now))

        clock.at(begin, start)
    clock.run()
    return found


def test_two_share_a_link() -> None:
    # Alone for a second, at half for two, alone again.
    assert ends([(0, 2.0), (1, 1.0)], 1.0) == pytest.approx([3.0, 3.0])
    assert ends([(0, 3.0), (1, 1.0)], 1.0) == pytest.approx([4.0, 3.0])


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 5)), min_size=1, max_size=6))
def test_a_link_is_never_idle_while_bytes_wait(flows: list[tuple[float, float]]) -> None:
    """The last one ends when a link that serves them in any order would be done."""
    busy = 0.0
    for begin, size in sorted(flows):
        busy = max(busy, begin) + size / 2.0
    assert max(ends(flows, 2.0)) == pytest.approx(busy)


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=6))
def test_equal_shares_from_the_beginning(sizes: list[float]) -> None:
    """Of those that begin together the k-th smallest ends when it and all smaller ones are gone,
    and as much of each larger one."""
    for size, end in zip(sizes, ends([(0, size) for size in sizes], 1.0), strict=True):
        assert end == pytest.approx(sum(min(size, other) for other in sizes))


def test_the_slowest_link_of_a_route_decides() -> None:
    clock, done = Clock(), []
    Network(clock).send((Link(4.0), Link(1.0), Link(2.0)), 8.0, lambda: done.append(clock.now))
    clock.run()
    assert done == [8.0]


@pytest.mark.parametrize(("rate", "end"), [(100.0, 10.02), (0.5, 16.0), (0.1, 80.0)])
def test_pages_that_appear_over_time(rate: float, end: float) -> None:
    """8 bytes in 4 parts until 10 s: whichever takes longer, making or sending them."""
    clock, done = Clock(), []
    Network(clock).send((Link(rate),), 8.0, lambda: done.append(clock.now), ready_at=10.0, tail=2.0)
    clock.run()
    assert done == pytest.approx([end])
