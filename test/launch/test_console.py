"""What launch_pd shows on a terminal and in a pipe, with real processes behind it."""

import io
import os
import re
import signal
from pathlib import Path

import pytest

from sglang_hma.launch.console import STATUS_EVERY_S, Console

from .fleet import Launch, Run

ESCAPE = "\x1b"


def block(run: Run) -> list[str]:
    """The lines from the ready line on, checked but for what comes after them."""
    lines = run.lines()
    start = next(i for i, line in enumerate(lines) if line.startswith("sglang-hma ready: "))
    ready, curl, logs, stop, *rest = lines[start:]
    url = f"http://127.0.0.1:{run.port}"
    assert re.fullmatch(rf"sglang-hma ready: {url} \(\d+ s\)", ready)
    assert curl.startswith(f"  try:  curl -s {url}/v1/chat/completions ")
    assert logs == f"  logs: {run.logs}/{{prefill-0,decode-0,router}}.log"
    assert stop == f"  stop: Ctrl-C, or kill {run.popen.pid}"
    return rest


def stopped_by_term(run: Run) -> None:
    run.wait_for("  stop: ")
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0
    stopping, stopped = block(run)
    assert stopping.startswith("sglang-hma stopping")
    assert stopped == "sglang-hma stopped on SIGTERM"


def test_terminal_shows_one_live_line_and_then_the_block(launch: Launch) -> None:
    run = launch("--prefill-args", "--fake-start-s 0.5", columns=200)
    stopped_by_term(run)
    # Nothing but the block is left on the screen, and what was there had the time and a stage.
    assert run.lines()[0].startswith("sglang-hma ready: ")
    assert re.search(r" \d+ s prefill-0, decode-0: importing SGLang", run.text())
    assert "[prefill-0]" not in run.text() and run.err.read_text() == ""


def test_narrow_terminal_breaks_no_line(launch: Launch) -> None:
    run = launch(columns=30)
    run.wait_for("  stop: ")
    (curl,) = [line for line in run.text().splitlines() if "try: " in line]
    assert curl.endswith("}'")
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_pipe_gets_plain_lines(launch: Launch) -> None:
    run = launch("--prefill-args", "--fake-start-s 0.5")
    stopped_by_term(run)
    assert ESCAPE not in run.text() and "[prefill-0]" not in run.text()
    begun = [line for line in run.lines() if line.startswith("sglang-hma: ")]
    assert [re.sub(r"\d+", "N", line) for line in begun if "importing" not in line] == [
        "sglang-hma: starting prefill-N, decode-N (N s)",
        "sglang-hma: connecting the router (N s)",
        "sglang-hma: waiting for a first answer (N s)",
    ]


def test_dumb_terminal_gets_plain_lines(launch: Launch) -> None:
    run = launch(columns=80, term="dumb")
    stopped_by_term(run)
    assert ESCAPE not in run.text()


@pytest.mark.parametrize("columns", [0, 200])
def test_verbose_shows_all_output(launch: Launch, columns: int) -> None:
    run = launch("--verbose", columns=columns)
    run.wait_for("  stop: ")
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0
    for name in ("prefill-0", "decode-0", "router"):
        log = (run.logs / f"{name}.log").read_text().splitlines()
        assert log and all(f"[{name}] {line}" in run.text() for line in log)


def test_stage_comes_from_the_log(launch: Launch, tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.write_text("[2026-01-01 00:00:00] Load weight begin. avail mem=1.00 GB\n")
    run = launch("--decode-args", f"--fake-never-healthy --fake-say {said}", columns=200)
    run.wait_for("decode-0: loading weights")
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_reader_may_go_away(launch: Launch) -> None:
    reader, writer = os.pipe()
    run = launch("--verbose", stdout=writer)
    os.close(writer)
    with os.fdopen(reader) as lines:
        assert any("stop: " in line for line in lines)
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_status_is_repeated_now_and_then() -> None:
    now = 100.0
    out = io.StringIO()
    console = Console(out, io.StringIO(), clock=lambda: now)
    for _ in range(40):
        console.status("starting a", "a: loading")
        now += STATUS_EVERY_S / 4
    console.status("")
    console.status("asking a")
    lines = out.getvalue().splitlines()
    assert (
        lines[0] == "sglang-hma: starting a (0 s)" and lines[-1] == "sglang-hma: asking a (100 s)"
    )
    assert len(lines) == 2 + 9 and all("a: loading" in line for line in lines[1:-1])
