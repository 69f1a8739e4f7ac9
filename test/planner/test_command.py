"""The command, as a user runs it."""

from pathlib import Path

import msgspec
import pytest

from sglang_hma.planner.__main__ import main


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    rows = "".join(f"{i * 500},{200 + 1000 * (i % 3)},{20 + i % 50}\n" for i in range(300))
    file.write_text(f"timestamp_ms,input_length,output_length\n{rows}")
    return file


def test_compare(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    main(
        f"compare --trace {trace} --budget-usd 52000 --seeds 1 --requests 200 --processes 1 "
        f"--systems pd-bf16 ours --json {found}".split()
    )
    out = capsys.readouterr().out
    assert "BFP8 pages, sent layer by" in out
    assert "assumed" in out
    mixes = msgspec.json.decode(found.read_bytes())["mixes"]
    assert {mix["system"] for mix in mixes} == {"pd-bf16", "ours"}
    assert all(mix["price_usd"] <= 52000 for mix in mixes)
    assert all(mix["goodput"]["rate"] > 0 for mix in mixes)
    main(["deploy", "--from", str(found), "--model-path", "/models/m"])
    best = max(mixes, key=lambda mix: mix["per_thousand_usd"])
    hosts = [line.split("-")[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert hosts == ["prefill"] * best["prefill"] + ["decode"] * best["decode"]


def test_impossible_is_said(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        f"compare --trace {trace} --budget-instances 1 --systems colocated --ttft 0.001 "
        "--tpot 0.1 --seeds 1 --requests 50 --processes 1".split()
    )
    assert "impossible" in capsys.readouterr().out


def test_a_rhythm_that_makes_it_impossible_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    burst = tmp_path / "burst.csv"
    burst.write_text("timestamp_ms,input_length,output_length\n" + "0,2000,5\n" * 50)
    main(
        f"compare --trace {burst} --budget-instances 1 --systems colocated --ttft 1 --tpot 1 "
        "--seeds 1 --processes 1".split()
    )
    said = "alone 100% are in time, in the trace's rhythm too few at any rate"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "no budget: give --budget-usd"),
        ("--budget-usd 100", "the budget buys no mix"),
        ("--budget-usd 1e5 --hbm b300", "card 'b300' is not in the catalogue"),
        ("--budget-usd 1e5 --link 1t", "link '1t' is not in the catalogue"),
        ("--budget-usd 1e5 --efficiency best", "efficiency 'best' is not in the catalogue"),
        ("--budget-usd 1e5 --model Qwen3-9B", "model 'Qwen3-9B' is no config.json"),
        ("--budget-usd 1e5 --model Llama-3.1-70B", "leave no room for KV on 1 x"),
        ("--budget-usd 1e5 --ttft 1", "--ttft and --tpot are one pair"),
        ("--budget-usd 1e5 --seeds 0", "--seeds is 0; needs 1 or more"),
        ("--budget-usd 1e5 --share 2", "--share is 2; needs a number between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(trace: Path, flags: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"compare --trace {trace} {flags}".split())
    message = str(ended.value)
    assert said in message
    assert message.startswith("sglang_hma.planner: error: ")
    assert "\n" not in message


def test_catalogue_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main(["catalogue"])
    out = capsys.readouterr().out
    assert "p150" in out
    assert "tenstorrent-ceiling" in out
