"""Tables against the points that AIConfigurator itself gives, and against their own grid."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.planner import catalogue, roofline, silicon
from sglang_hma.planner.model_shape import KNOWN

from .test_roofline import DECODE_AT_4096, PREFILL

CATALOGUE = catalogue.load()
TABLED = ("a100-sxm-80", "h100-sxm", "l40s")


@pytest.mark.parametrize("card", TABLED)
def test_points_come_out(card: str) -> None:
    times = silicon.times_of(card, roofline.nvidia(CATALOGUE, card, KNOWN["Qwen3-8B"]))
    assert isinstance(times, silicon.Silicon)
    assert "AIConfigurator" in times.used[-1].source
    for tokens, ms in PREFILL[card].items():
        assert times.prefill_s((tokens, 0)) * 1e3 == pytest.approx(ms, rel=0.02)
    for batch, ms in DECODE_AT_4096.get(card, {}).items():
        assert times.decode_s(batch, 4096 * batch) * 1e3 == pytest.approx(ms, rel=0.02)


def test_chunks_of_a_prompt_take_its_attention() -> None:
    """Attention is that of the pairs of tokens that see each other, however a prompt is cut."""
    times = silicon.times_of(
        "a100-sxm-80", roofline.nvidia(CATALOGUE, "a100-sxm-80", KNOWN["Qwen3-8B"])
    )
    whole = times.prefill_s((8192, 0))
    cut = sum(times.prefill_s((2048, start)) for start in range(0, 8192, 2048))
    assert cut == pytest.approx(whole, rel=0.1)


def test_bfp8_pages_shorten_attention_alone() -> None:
    plain, ours = (
        silicon.times_of(
            "a100-sxm-80", roofline.nvidia(CATALOGUE, "a100-sxm-80", KNOWN["Qwen3-8B"], kv=kv)
        )
        for kv in ("bf16", "bfp8")
    )
    speed = CATALOGUE.efficiencies["bfp8-decode-attention"].value
    linear = plain.decode_s(64, 0)
    assert ours.decode_s(64, 0) == linear
    assert ours.decode_s(64, 64 * 4096) - linear == pytest.approx(
        (plain.decode_s(64, 64 * 4096) - linear) / speed
    )
    # What decode has made itself is BF16.
    assert ours.decode_s(64, 0, 64 * 4096) == pytest.approx(plain.decode_s(64, 64 * 4096))


def test_a_pass_beside_decoding_takes_its_products_alone() -> None:
    """Beside a prompt, a request's token is one more in the products; launching attention, which
    takes 2 ms of 36 layers, is for the pass."""
    times = silicon.times_of(
        "a100-sxm-80", roofline.nvidia(CATALOGUE, "a100-sxm-80", KNOWN["Qwen3-8B"])
    )
    assert isinstance(times, silicon.Silicon)
    linear = times.table.prefill_linear
    assert times.table.tokens[7:9] == [2048, 4096]
    slope = (linear[8] - linear[7]) / 2048
    alone = times.prefill_s((2048, 0))
    assert times.prefill_s((2048, 0), beside=96) == pytest.approx(alone + 96 * slope)
    launch = times.table.prefill_attention[0]
    two = times.prefill_s((2048, 0), (2048, 0))
    attention = alone - linear[7]
    assert two == pytest.approx(linear[8] + 2 * attention - launch)


def test_without_a_table_there_is_the_roofline() -> None:
    eight = roofline.nvidia(CATALOGUE, "a100-sxm-80", KNOWN["Qwen3-8B"], 8)
    assert silicon.times_of("a100-sxm-80", eight) is eight
    assert silicon.load("n150") is None


@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.floats(0, 10)),
        min_size=2,
        max_size=8,
        unique_by=lambda p: p[0],
    ),
    st.floats(0, 2000),
)
def test_between_the_grid_is_a_straight_line(points: list[tuple[int, float]], at: float) -> None:
    import numpy as np

    points.sort()
    grid, values = [x for x, _ in points], [y for _, y in points]
    if at <= grid[-1]:
        assert silicon.between(grid, values, at) == pytest.approx(np.interp(at, grid, values))
    assert silicon.between(grid, values, 2 * grid[-1], power=2) == pytest.approx(4 * values[-1])
