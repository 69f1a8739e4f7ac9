"""Steps in closed form against the same steps one by one."""

from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.planner.simulation.steps import Steps

durations = st.floats(1e-4, 1.0)


@given(count=st.integers(1, 300), first=durations, growth=st.floats(0, 1e-2), begin=durations)
def test_ends_are_sums(count: int, first: float, growth: float, begin: float) -> None:
    steps = Steps(begin, count, first, growth)
    when = begin
    for step in range(count):
        when += first + step * growth
        assert abs(steps.end(step + 1) - when) <= 1e-9 * when


@given(
    count=st.integers(1, 300),
    first=durations,
    growth=st.floats(0, 1e-2),
    begin=durations,
    share=st.floats(0, 1.5),
)
def test_over_counts_the_steps_that_have_ended(
    count: int, first: float, growth: float, begin: float, share: float
) -> None:
    steps = Steps(begin, count, first, growth)
    when = begin + share * (steps.end(count) - begin)
    assert steps.over(when) == sum(steps.end(step) <= when for step in range(1, count + 1))


@given(count=st.integers(1, 300), first=durations, growth=st.floats(0, 1e-2), begin=durations)
def test_a_step_is_over_when_it_ends(count: int, first: float, growth: float, begin: float) -> None:
    steps = Steps(begin, count, first, growth)
    assert [steps.over(steps.end(step)) for step in range(count + 1)] == list(range(count + 1))
