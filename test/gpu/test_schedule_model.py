"""The model of the decode kernel's schedule against closed forms, on the kernel's own division."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmark.kernels import decode_model as model
from benchmark.kernels import schedule_model
from benchmark.kernels.division import divider
from hma_kernels.cuda.build import Instance
from hma_kernels.layout import PAGE

INSTANCE = Instance("__nv_bfloat16", 128, 128, 1, 3)
BANDWIDTH, FIXED = 3e12, 5e-6


def loads(
    lengths: list[int], blocks: int, kv_heads: int = 1, bf16_pages: bool = False
) -> np.ndarray:
    """Tiles of each warp that the division has given any."""
    rows = divider(INSTANCE).divide(
        lengths, kv_heads=kv_heads, gqa_group_size=4, blocks=blocks, bf16_pages=bf16_pages
    )
    return np.bincount(rows["warp"], rows["tiles"]).astype(int)


@pytest.mark.parametrize("bf16_pages", [False, True])
@pytest.mark.parametrize("trial", range(5))
def test_loads_are_equal(rng: np.random.Generator, trial: int, bf16_pages: bool) -> None:
    lengths = rng.integers(0, 5000, int(rng.integers(1, 40))).tolist()
    heads, blocks = int(rng.integers(1, 9)), int(rng.integers(1, 300))
    found = loads(lengths, blocks, heads, bf16_pages)
    tiles = heads * sum(-(-length // PAGE) for length in lengths) * (2 if bf16_pages else 1)
    warps = min(max(tiles // 2, 1), blocks * INSTANCE.warps)
    assert found.sum() == tiles
    assert len(found) == (warps if tiles else 0)
    assert tiles == 0 or {tiles // warps, -(-tiles // warps)} >= set(found.tolist())


@pytest.mark.parametrize("trial", range(5))
def test_one_request_over_all_warps(rng: np.random.Generator, trial: int) -> None:
    """N tiles over G warps: N // G rounds of all of them, and one of the rest, which are bound by
    memory's latency if they are few."""
    blocks = int(rng.integers(1, 200))
    warps = blocks * INSTANCE.warps
    tiles = int(rng.integers(2 * warps, 20 * warps))
    found = loads([tiles * PAGE], blocks)
    size = model.BFP8_TILE_BYTES
    most = INSTANCE.stages * size / model.LATENCY_S
    expected = tiles // warps * warps * size / BANDWIDTH
    expected = max(expected, tiles // warps * size / most)
    if rest := tiles % warps:
        expected += max(rest * size / BANDWIDTH, size / most)
    got = model.streaming_seconds([[n * size] for n in found], BANDWIDTH, most, model.LATENCY_S)
    assert got == pytest.approx(expected, rel=1e-9)


def test_pauses_cost_one_warp_all_and_many_nothing() -> None:
    """A warp alone waits at each change; beside others that read meanwhile memory is never idle."""
    alone = model.streaming_seconds([[10.0, 20.0, 30.0]], 5.0, 100.0, 2.0)
    assert alone == pytest.approx(60 / 5 + 2 * 2)
    beside = model.streaming_seconds([[10.0, 20.0, 30.0], [300.0]], 5.0, 100.0, 2.0)
    assert beside == pytest.approx(360 / 5)
    assert model.streaming_seconds([], 5.0, 100.0, 2.0) == 0


def test_units_that_are_one_warps_alone_leave_no_partial_state() -> None:
    """As many requests of equal length as there are warps to every head: nothing is lost."""
    card = model.CARDS["h100"]
    warps = model.predict(card, [32768], BANDWIDTH, FIXED).working_warps
    lengths = [320] * (warps // model.KV_HEADS)
    assert len(lengths) * model.KV_HEADS == warps
    made = model.predict(card, lengths, BANDWIDTH, FIXED)
    assert made.partial_states == 0
    assert made.most_tiles == 10
    assert made.schedule_share == pytest.approx(1)
    assert made.call == pytest.approx(made.bytes / BANDWIDTH + made.queue + FIXED)


def test_bytes_are_those_of_the_pages(rng: np.random.Generator) -> None:
    lengths = rng.integers(1, 9000, 20).tolist()
    pages = sum(-(-length // PAGE) for length in lengths)
    values = 2 * pages * PAGE * model.KV_HEADS * model.DIM
    card = model.CARDS["h200"]
    assert model.predict(card, lengths, BANDWIDTH, FIXED).bytes == values * 17 / 16
    plain = model.predict(card, lengths, BANDWIDTH, FIXED, bf16_pages=True)
    assert plain.bytes == values * 2


@pytest.mark.parametrize("card", model.CARDS.values(), ids=list(model.CARDS))
def test_monotony(card: model.Card) -> None:
    """More requests and longer ones take longer, at a share that rises; a faster memory is
    faster; no share is above 1."""
    for grown in ([[8192] * n for n in (1, 4, 16, 64)], [[n] for n in (4096, 32768, 131072)]):
        made = [model.predict(card, lengths, BANDWIDTH, FIXED) for lengths in grown]
        assert [m.call for m in made] == sorted(m.call for m in made)
        for share in ("schedule_share", "call_share"):
            shares = [getattr(m, share) for m in made]
            assert shares == sorted(shares)
            assert shares[0] > 0 and shares[-1] <= 1
        for m, lengths in zip(made, grown, strict=True):
            assert model.predict(card, lengths, 2 * BANDWIDTH, FIXED).call < m.call


def test_the_shortest_measured_shape_is_met_by_construction() -> None:
    measured = schedule_model.measurement(schedule_model.MEASURED)
    shortest = min(measured.points, key=lambda point: sum(point.lengths))
    fixed = measured.fixed()
    assert fixed > 0
    assert math.isclose(measured.predict(shortest, fixed).call, shortest.seconds)


def test_another_card_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "other.json"
    target.write_text(json.dumps({"gpu": {"gpu": "NVIDIA L40S"}, "points": []}))
    with pytest.raises(ValueError, match="was measured on NVIDIA L40S; the model knows a100, h100"):
        schedule_model.measurement(target)


def test_the_schedule_meets_its_targets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "model.json"
    monkeypatch.setattr("sys.argv", ["schedule_model", "--json", str(target)])
    schedule_model.main()
    written = json.loads(target.read_text())
    assert set(written["cards"]) == set(model.CARDS)
    assert all(len(shapes) == 10 for shapes in written["cards"].values())
    figures = [f for f in written["figures"] if "schedule leaves" in f["name"]]
    assert len(figures) == 8 * len(model.CARDS)
    assert all(figure["reached"] for figure in figures)
    # a target that is out of reach makes --check exit 1
    monkeypatch.setattr(schedule_model, "LARGE_BATCH_SHARE", 1.01)
    monkeypatch.setattr("sys.argv", ["schedule_model", "--check"])
    with pytest.raises(SystemExit):
        schedule_model.main()
