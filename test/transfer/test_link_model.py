"""The link model and the group sizer against closed forms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer.prefill.link_model import GroupSizer, LinkModel


@given(st.floats(1e-5, 5e-2), st.floats(1e6, 1e11))
def test_the_link_model_finds_latency_and_bandwidth(latency: float, rate: float) -> None:
    model = LinkModel()
    for size in (1e3, 1e5, 1e7):  # another link before
        model.observe(size, 1e-3 + size / 1e8)
    for i in range(LinkModel.SAMPLES):
        size = latency * rate * (0.1 + 3 * (i % 7))
        model.observe(size, latency + size / rate)
    assert model.latency_s == pytest.approx(latency, rel=1e-3)
    assert model.bytes_per_s == pytest.approx(rate, rel=1e-3)


@given(st.integers(1, 200), st.integers(1, 10**8), st.floats(0, 0.1), st.floats(1e5, 1e11))
def test_groups_are_between_one_layer_and_a_quarter(
    layers: int, layer_bytes: int, latency: float, rate: float
) -> None:
    link = LinkModel()
    for size in (1e4, 1e6, 1e8) * 50:
        link.observe(size, latency + size / rate)
    count = GroupSizer().layers(link, layer_bytes, layers)
    assert 1 <= count <= max(1, layers // 4)
    if count < max(1, layers // 4):
        assert count * layer_bytes >= 3.5 * link.latency_s * link.bytes_per_s
    assert GroupSizer(7).layers(link, layer_bytes, layers) == min(7, layers)


def test_writes_of_one_size_tell_the_bandwidth() -> None:
    model = LinkModel()
    for _ in range(9):
        model.observe(5e6, 0.1)
    assert model.latency_s == 0 and model.bytes_per_s == pytest.approx(5e7)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 10)), max_size=40))
def test_no_measurement_breaks_the_model(seen: list[tuple[int, float]]) -> None:
    model = LinkModel()
    for size, seconds in seen:
        model.observe(size, seconds)
        assert model.latency_s >= 0 and 0 < model.bytes_per_s < float("inf")
