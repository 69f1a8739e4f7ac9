"""What is fitted to recorded runs: beside times that are known, and what is no run is refused."""

import json
import statistics
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sglang_hma.planner import measured, recorded
from sglang_hma.planner.__main__ import main
from sglang_hma.planner.fit import fit, nonnegative
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.measured import DecodeTimes, Measured, PrefillTimes
from sglang_hma.planner.recorded import Run, RunError
from sglang_hma.planner.replay import Pair, beside
from sglang_hma.planner.trace import Request, poisson

from .pair_by_steps import PairBySteps

CHUNK = 4096


def drawn_times(rng: np.random.Generator) -> Measured:
    """Of a small machine: each coefficient up to a factor of two either way."""
    plain = (0.05, 1e-3, 4e-7, 0.02, 4e-3, 2e-6, 0.03)
    seconds = [float(x) for x in 2 ** rng.uniform(-1, 1, 7) * plain]
    return Measured("drawn", PrefillTimes(*seconds[:3]), DecodeTimes(*seconds[3:6]), seconds[6])


def mixed(rng: np.random.Generator, count: int, apart_s: float, together: int = 1) -> list[Request]:
    """Requests of many lengths, `together` at once."""
    prompts = np.exp(rng.uniform(np.log(32), np.log(1024), count))
    return [
        Request(apart_s * (i // together), int(prompt), int(new))
        for i, (prompt, new) in enumerate(zip(prompts, rng.integers(8, 49, count), strict=True))
    ]


def calibration(rng: np.random.Generator, times: Measured, noise: float) -> list[Run]:
    """Alone and in bursts, as the real pair is calibrated."""
    return [
        PairBySteps(requests, times, CHUNK, noise, int(rng.integers(2**31))).run()
        for requests in (mixed(rng, 20, 60.0), mixed(rng, 48, 120.0, together=8))
    ]


def passes(times: Measured) -> list[float]:
    """Of several prompts together, which is what a queue waits for."""
    return [
        times.affine.prefill_s(*[(tokens, 0)] * many) for tokens in (128, 768) for many in (2, 5)
    ]


def first_tokens(times: Measured) -> list[float]:
    """TTFT alone."""
    return [times.affine.prefill_s((n, 0)) + times.overhead_s for n in (64, 256, 1024)]


def steps(times: Measured) -> list[float]:
    return [times.affine.decode_s(n, n * seen) for n in (1, 4, 8) for seen in (100, 800)]


def test_known_times_are_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = drawn_times(rng)
    found = fit(calibration(rng, times, noise=0.0), Pair(CHUNK), "by steps")
    assert astuple(found.decode) == pytest.approx(astuple(times.decode), rel=1e-6)
    for seconds in (passes, first_tokens, steps):
        assert seconds(found) == pytest.approx(seconds(times), rel=0.02)


def test_noise_does_not_mislead(seed: int) -> None:
    """Every pass and step is off by 3%, either way, one in three by more: what they come to is not
    off by five times as much, nor steps, of which there are many, by twice."""
    rng = np.random.default_rng(seed)
    times = drawn_times(rng)
    found = fit(calibration(rng, times, noise=0.03), Pair(CHUNK), "by steps")
    assert first_tokens(found) == pytest.approx(first_tokens(times), rel=0.15)
    assert steps(found) == pytest.approx(steps(times), rel=0.06)


def test_fitted_to_one_shape_the_simulator_says_the_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = drawn_times(rng)
    pair = Pair(CHUNK)
    found = fit(calibration(rng, times, noise=0.0), pair, "by steps")
    for lengths in ((128, 64), (768, 32)):
        rate = 0.6 / max(times.affine.prefill_s((lengths[0], 0)), 0.2)
        run = PairBySteps(poisson([lengths], rate, 60, seed), times, CHUNK).run()
        figures = beside(run, pair, found, pair.objectives(found, run.requests))
        assert [each.name for each in figures] == [
            "median TTFT",
            "P90 TTFT",
            "median TPOT",
            "P90 TPOT",
            "goodput",
        ]
        for each in figures:
            assert abs(each.error) < 0.03, each


def test_figures_are_the_runs_own(seed: int) -> None:
    """Quantiles and goodput, worked out from the token times by themselves."""
    rng = np.random.default_rng(seed)
    times = drawn_times(rng)
    run = PairBySteps(mixed(rng, 30, 0.5), times, CHUNK).run()
    limits = Objectives(statistics.median(run.ttft_s), statistics.median(run.tpot_s))
    figures = {each.name: each for each in beside(run, Pair(CHUNK), times, limits)}
    kept = sum(
        ttft <= limits.ttft_s and statistics.fmean(gaps) <= limits.tpot_s
        for ttft, gaps in zip(run.ttft_s, run.gaps_s, strict=True)
    )
    last = max(
        request.arrival_s + ttft + sum(gaps)
        for request, ttft, gaps in zip(run.requests, run.ttft_s, run.gaps_s, strict=True)
    )
    assert figures["goodput"].real == pytest.approx(kept / last)
    assert figures["median TTFT"].real == pytest.approx(statistics.median(run.ttft_s))
    assert figures["P90 TPOT"].real == pytest.approx(
        statistics.quantiles(map(statistics.fmean, run.gaps_s), n=10, method="inclusive")[-1]
    )
    # The simulator has the same times, so it is exact.
    for each in figures.values():
        assert each.error == pytest.approx(0, abs=1e-6)


def test_nonnegative_least_squares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.uniform(0, 1, (50, 3)) * (1, 1e3, 1e-3)
    assert nonnegative(matrix, matrix @ (2, 0, 3)) == pytest.approx((2, 0, 3), abs=1e-9)
    found = nonnegative(matrix, matrix @ (2, -1e-3, 3e3))
    assert found[1] == 0
    assert found[[0, 2]] == pytest.approx(
        np.linalg.lstsq(matrix[:, [0, 2]], matrix @ (2, -1e-3, 3e3))[0]
    )


def astuple(times: Any) -> tuple[Any, ...]:
    return msgspec.structs.astuple(times)


def details(run: Run) -> dict[str, Any]:
    """As a load generator writes it."""
    return {
        "input_lens": [request.input_tokens for request in run.requests],
        "output_lens": [request.output_tokens for request in run.requests],
        "start_times": [1000 + request.arrival_s for request in run.requests],
        "ttfts": list(run.ttft_s),
        "itls": [list(gaps) for gaps in run.gaps_s],
        "errors": ["" for _ in run.requests],
    }


def test_a_recorded_file_is_read(tmp_path: Path, seed: int) -> None:
    """In order of arrival, whatever the file's; the first comes at 0."""
    rng = np.random.default_rng(seed)
    run = PairBySteps(mixed(rng, 12, 1.5), drawn_times(rng), CHUNK).run("a name")
    order = rng.permutation(12)
    shuffled = {name: [each[i] for i in order] for name, each in details(run).items()}
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(shuffled) + "\n\n" + json.dumps(shuffled | {"tag": "a name"}) + "\n")
    unnamed, named = recorded.load(file)
    assert (unnamed.name, named.name) == ("runs", "a name")
    assert named.requests == run.requests
    assert (named.ttft_s, named.gaps_s) == (run.ttft_s, run.gaps_s)


def test_without_start_times_requests_came_one_after_the_other(tmp_path: Path) -> None:
    """As bench_serving --max-concurrency 1 sends them."""
    file = tmp_path / "run.jsonl"
    file.write_text(json.dumps(GOOD | {"start_times": None, "max_concurrency": 1}))
    (run,) = recorded.load(file)
    assert [each.arrival_s for each in run.requests] == pytest.approx([0.0, 0.5 + 0.1 + 0.2])
    assert run.duration_s == pytest.approx(0.8 + 0.25)


GOOD: dict[str, Any] = {
    "input_lens": [8, 9],
    "output_lens": [3, 1],
    "start_times": [0.0, 1.0],
    "ttfts": [0.5, 0.25],
    "itls": [[0.1, 0.2], []],
    "errors": ["", ""],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"itls": None},
            r"Expected `array`, got `null` - at `\$.itls`; needs what bench_serving's",
        ),
        ({"input_lens": [], "output_lens": [], "ttfts": [], "itls": []}, "has no request"),
        ({"ttfts": [0.5]}, "ttfts are 1 for 2 requests"),
        ({"start_times": [0.0, 1.0, 2.0]}, "start_times are 3 for 2 requests"),
        ({"ttfts": [0.5, -1]}, r"> 0.0 - at `\$.ttfts\[1\]`"),
        ({"itls": [[0.1, float("nan")], []]}, "invalid character"),
        ({"itls": [[0.1] * 3, []]}, r"itls\[0\] are 3 for 3 tokens; needs fewer"),
        ({"itls": [0.1, []]}, r"Expected `array`, got `float` - at `\$.itls\[0\]`"),
        ({"output_lens": [3, 0]}, r"`int` >= 1 - at `\$.output_lens\[1\]`"),
        ({"input_lens": [8, 9.5]}, r"Expected `int`, got `float` - at `\$.input_lens\[1\]`"),
        ({"errors": ["", "Traceback\nOSError: gone"]}, "1 requests failed, .*: OSError: gone"),
        ({"start_times": None, "max_concurrency": 4}, "has no start_times, so nothing says"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(RunError, match=rf"run\.jsonl:2: .*{said}") as error:
        recorded.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "run.jsonl: has no run"),
        (json.dumps(GOOD | {"itls": [[], []]}), "no request of these runs has a later token"),
        ("{", "run.jsonl:1: "),
        ("[1]", "run.jsonl:1: Expected `object`"),
    ],
)
def test_what_is_no_file_of_runs_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["fit", str(tmp_path / "run.jsonl")])
    assert said in str(ended.value)
    assert "\n" not in str(ended.value)


@pytest.fixture
def run_file(tmp_path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    file = tmp_path / "runs.jsonl"
    runs = calibration(rng, drawn_times(rng), noise=0.0)
    file.write_text("".join(json.dumps(details(run)) + "\n" for run in runs))
    return file


def test_the_command(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fits and saves; the saved times say the same of the same runs."""
    saved = tmp_path / "times.yaml"
    main(f"fit {run_file} --chunk-tokens {CHUNK} --save {saved}".split())
    fitted = capsys.readouterr().out
    assert "step times fitted to runs.jsonl" in fitted
    assert fitted.count("median TTFT") == 2
    main(f"fit {run_file} --chunk-tokens {CHUNK} --times {saved}".split())
    assert capsys.readouterr().out == fitted


def test_fitted_times_are_planned_with(run_file: Path, tmp_path: Path) -> None:
    """ours and hetero-serial take them; what has not run on these cards does not."""
    saved, found = tmp_path / "times.yaml", tmp_path / "found.json"
    main(f"fit {run_file} --save {saved}".split())
    rows = "".join(f"{100 * i},{200 + i},{9 + i % 30}\n" for i in range(300))
    (tmp_path / "trace.csv").write_text(f"timestamp_ms,input_length,output_length\n{rows}")
    question = f"compare --trace {tmp_path / 'trace.csv'} --budget-instances 2 --seeds 1"
    question += f" --processes 1 --systems pd-bf16 ours --ttft 1 --tpot 0.05 --json {found}"
    kinds = {}
    for flags in ("", f" --times {saved}"):
        main((question + flags).split())
        mixes = msgspec.json.decode(found.read_bytes())["mixes"]
        kinds[flags] = {mix["system"]: (mix["goodput"]["rate"], mix["figures"]) for mix in mixes}
    without, with_times = kinds.values()
    assert with_times["pd-bf16"] == without["pd-bf16"]
    assert with_times["ours"][0] < without["ours"][0]  # a small CPU's
    # Prefill cannot be busy for more than all of the time.
    tokens = np.mean([200 + i for i in range(300)])
    assert with_times["ours"][0] * tokens * measured.load(saved).prefill.token_s < 1.1
    assert any(each["kind"] == "measured" for each in with_times["ours"][1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--times x.yaml --save y.yaml", "--save is for fitted times"),
        ("--ttft 1", "--ttft and --tpot are one pair"),
        ("--chunk-tokens 0", "--chunk-tokens is 0; needs more than 0"),
        ("--times gone.yaml", "gone.yaml: "),
        ("--save /gone/times.yaml", "/gone/times.yaml: "),
    ],
)
def test_bad_flags_are_one_line(run_file: Path, flags: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"fit {run_file} {flags}".split())
    assert said in str(ended.value)
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("token_s: 0.001", "token_s: -1", ">= 0.* `\\$.prefill.token_s`"),
        ("token_s: 0.001", "token_ms: 1", "unknown field `token_ms`"),
        ("step_s: 0.02", "step_s: fast", "Expected `float`, got `str`"),
        ("source: here", "source: [", "while parsing"),
    ],
)
def test_bad_times_are_one_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = tmp_path / "times.yaml"
    times = Measured("here", PrefillTimes(0.05, 0.001, 0.0), DecodeTimes(0.02, 0.0, 0.0), 0.01)
    measured.save(file, times)
    assert measured.load(file) == times
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(measured.TimesError, match=rf"times\.yaml: .*{said}") as error:
        measured.load(file)
    assert "\n" not in str(error.value)
