"""Why a program ended: its own exception, as Python prints it, from among what SGLang prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_hma.launch.diagnosis import KILLED, diagnose

from .fleet import Launch

BEFORE = """\
[2026-11-25 19:34:54] Init parallel begin.
/v/site-packages/awq.py:53: UserWarning: Only CUDA, HIP and XPU support AWQ currently.
  warnings.warn(f"Only CUDA, HIP and XPU support AWQ currently.")

Multi-thread loading shards: 100% Completed | 1/1 [00:00<00:00, 28.21it/s]
"""
AFTER = """\

[2026-11-25 19:35:03] Received sigquit from a child process. It usually means the child failed.
[2026-11-25 19:35:03] kill_process_tree called: parent_pid=1449, include_parent=True, pid=1449
"""


def traceback_of(code: str) -> str:
    """What Python prints of it, as SGLang logs it."""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    return f"[2026-11-25 19:35:03] Scheduler hit an exception: {done.stderr}"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('no room')", ["RuntimeError: no room"]),
        ("raise KeyError", ["KeyError"]),
        ("raise OSError('one\\ntwo')", ["OSError: one", "two"]),
        ("try: 1/0\nexcept ZeroDivisionError: int('x')", ["ValueError: invalid literal"]),
        ("try: 1/0\nexcept ZeroDivisionError as e: raise KeyError(3) from e", ["KeyError: 3"]),
    ],
)
def test_exception(code: str, words: list[str]) -> None:
    lines = (BEFORE + traceback_of(code) + AFTER).splitlines()
    found = diagnose(lines, killed=True).words
    assert len(found) == len(words)
    assert all(line.startswith(word) for line, word in zip(found, words, strict=True))


def test_one_line_error_wins() -> None:
    ours = "sglang_hma.launch_server: error: --page-size is 7: use --page-size 32"
    lines = (BEFORE + traceback_of("raise KeyError") + ours + "\n" + AFTER).splitlines()
    assert diagnose(lines, killed=False).words == [ours]


def test_without_either_the_last_lines_that_are_no_noise() -> None:
    lines = [*BEFORE.splitlines(), "the disk is on fire", *AFTER.splitlines()]
    assert diagnose(lines, killed=False).words == [lines[0], "the disk is on fire"]
    assert diagnose(lines, killed=True).remedy == KILLED
    assert diagnose([], killed=False).words == []


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("OSError(28, 'No space left on device')", "disk"),
        ("MemoryError()", "--max-total-tokens"),
        ("OSError(98, 'Address already in use')", "port"),
        ("ValueError('who knows')", ""),
    ],
)
def test_remedy(error: str, advice: str) -> None:
    found = diagnose(traceback_of(f"raise {error}").splitlines(), killed=True)
    assert advice in found.remedy and bool(advice) == bool(found.remedy)


def test_server_that_fails_shows_why(launch: Launch, tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.write_text(BEFORE + traceback_of("raise MemoryError('no room')") + AFTER)
    run = launch("--decode-args", f"--fake-die --fake-orphans --fake-say {said}")
    assert run.end() == 1
    log = run.logs / "decode-0.log"
    first, why, last = run.err.read_text().splitlines()
    assert first == f"decode-0 failed, {log} ends with:"
    assert why == "  MemoryError: no room"
    error, remedy = last.split(": free some memory")
    assert error == "sglang_hma.launch_pd: error: decode-0 ended with exit code 7 while starting"
    assert "--max-total-tokens" in remedy and "sglang-hma ready" not in run.text()
    assert AFTER.splitlines()[-1] in log.read_text()


def test_what_servers_log_about_their_end() -> None:
    stamp = "[2026-11-26 20:16:12] "
    died = "Subprocess detokenizer (pid=13481) crashed with exit code -9"
    lines = [f"{stamp}{died}. Triggering SIGQUIT for cleanup...", f"{stamp}SIGQUIT received."]
    assert diagnose(lines, killed=True).words == [died]
    hung = "sglang_hma.launch_server: error: no scheduler has answered or computed for 121 s"
    assert diagnose([*lines, f"{stamp}{hung}"], killed=True).words == [hung]
