"""Traces as recorded, and what is wrong with one that cannot be replayed."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from sglang_hma.planner import trace
from sglang_hma.planner.trace import Request, TraceError, at_rate, excerpt, load, poisson, spread

CSV = "timestamp_ms,input_length,output_length\n0,10,2\n1500,20,3\n1500,30,4\n"
LINE = '{"timestamp_ms": 7, "input_length": 900, "output_length": 5, "hash_ids": [4, 9]}\n'


def test_both_forms(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "a.jsonl").write_text(LINE + "\n" + LINE)
    assert load(tmp_path / "a.csv")[1:] == [Request(1.5, 20, 3), Request(1.5, 30, 4)]
    assert load(tmp_path / "a.jsonl") == [Request(0.007, 900, 5, (4, 9))] * 2


@pytest.mark.parametrize(("name", "text"), [("a.csv", CSV), ("a.jsonl", LINE * 3)])
def test_packed_ones_too(tmp_path: Path, name: str, text: str) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert load(packed) == load(plain)
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(TraceError, match=rf"{name}\.gz: "):
        load(packed)
    packed.write_text(text)
    with pytest.raises(TraceError, match=rf"{name}\.gz: Not a gzipped file"):
        load(packed)


@pytest.mark.parametrize(
    ("name", "requests", "mean"),
    [
        ("azure2023_conv.csv", 19_366, 1155),
        ("azure2023_code.csv", 8_819, 2048),
        ("mooncake_conversation.jsonl.gz", 12_031, 12_035),
    ],
)
def test_the_traces_that_come_along(name: str, requests: int, mean: int) -> None:
    """All requests of a source, and the prompt tokens that it had on average."""
    found = load(Path(__file__).parents[2] / "benchmark" / "planner" / "traces" / name)
    assert len(found) == requests
    assert np.mean([each.input_tokens for each in found]) == pytest.approx(mean, abs=1)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", CSV.replace("1500,20", "1500,-20"), r"a\.csv:3: input_length is -20"),
        ("a.csv", CSV.replace("20,3", "20,0"), r"a\.csv:3: output_length is 0"),
        ("a.csv", CSV.replace("20,3", "2.5,3"), r"input_length is 2\.5"),
        ("a.csv", CSV.replace("20,3", "nan,3"), r"input_length is nan"),
        ("a.csv", CSV.replace("1500,30", "1400,30"), r"request 3 comes at 1400 ms, before"),
        ("a.csv", CSV.replace("0,10,2", "-5,10,2"), r"timestamp_ms is -5"),
        ("a.csv", CSV.replace("0,10,2", "0,10"), r"a\.csv:2"),
        ("a.csv", CSV.replace("input_length", "prompt"), r"has no 'input_length'"),
        ("a.csv", "timestamp_ms,input_length,output_length\n", r"has no request"),
        ("a.jsonl", LINE + "{", r"a\.jsonl:2"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1"),
        ("a.jsonl", LINE.replace("[4, 9]", '["x"]'), r"a\.jsonl:1"),
    ],
)
def test_a_bad_trace_is_one_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError, match=words) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_coarse_clock_makes_no_bursts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    step, true = float(rng.uniform(0.5, 9)), np.sort(rng.uniform(0, 100, 400))
    seen = [Request(float(at // step * step), place, 1) for place, at in enumerate(true)]
    found = spread(seen)
    assert [each.input_tokens for each in found] == list(range(400))
    arrivals = np.array([each.arrival_s for each in found])
    assert (np.diff(arrivals) > 0).all()
    assert (np.floor(arrivals / step + 1e-9) == true // step).all()
    assert spread(found) == found


def test_times_that_mean_what_they_say_stay() -> None:
    few = [Request(float(place // 9), 5, 1) for place in range(90)]
    own = [Request(place - 0.1 * (place % 3 == 1), 5, 1) for place in range(300)]
    pauses = [Request(11.0 * (place // 9), 5, 1) for place in range(300)]
    at_once = [Request(0.0, 5, 1)] * 300
    for requests in (few, own, pauses, at_once):
        assert spread(requests) == requests


def test_another_rate_keeps_the_rhythm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = poisson([(5, 1), (9, 2)], 3.0, 400, seed)
    rate = float(rng.uniform(0.1, 50))
    faster = at_rate(requests, rate)
    assert (len(faster) - 1) / faster[-1].arrival_s == pytest.approx(rate)
    before = np.diff([each.arrival_s for each in requests])
    after = np.diff([each.arrival_s for each in faster])
    assert np.allclose(after / after.sum(), before / before.sum())
    assert [each.input_tokens for each in faster] == [each.input_tokens for each in requests]


def test_drawn_requests_come_as_often_as_asked(seed: int) -> None:
    requests = poisson([(5, 1)], 4.0, 20_000, seed)
    gaps = np.diff([each.arrival_s for each in requests])
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)  # exponential
    assert requests == trace.poisson([(5, 1)], 4.0, 20_000, seed)


def test_an_excerpt_stands_in_its_trace(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = [
        Request(float(at), index + 1, 1)
        for index, at in enumerate(rng.exponential(1.0, 50).cumsum())
    ]
    start, count = int(rng.integers(0, 40)), 10
    rate, around = float(rng.uniform(0.5, 20)), rng.uniform(0, 8, 2)
    found, meant = excerpt(requests, start, count, rate, *map(float, around))
    judged = found[meant]
    assert [each.input_tokens for each in judged] == list(range(start + 1, start + count + 1))
    assert (count - 1) / (judged[-1].arrival_s - judged[0].arrival_s) == pytest.approx(rate)
    before, after = np.ceil(around * rate)
    assert (meant.start, len(found)) == (before, before + count + after)
    order = [(each.input_tokens - found[0].input_tokens) % 50 for each in found]
    assert order == [index % 50 for index in range(len(found))]
    gaps = np.diff([each.arrival_s for each in found])
    assert (gaps >= 0).all()
    original = np.diff([each.arrival_s for each in requests])
    inside = [i for i, each in enumerate(found[:-1]) if each.input_tokens < 50]
    scale = gaps[inside] / [original[found[i].input_tokens - 1] for i in inside]
    assert np.allclose(scale, scale[0])


def test_an_excerpt_of_requests_at_one_time() -> None:
    found, meant = excerpt([Request(1.0, 5, 1)] * 3, 0, 3, 2.0, 1.0, 0.5)
    assert [each.arrival_s for each in found] == [0.0] * 6
    assert meant == slice(2, 5)
