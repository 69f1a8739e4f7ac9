"""Real semaphores of real processes, which are killed."""

import subprocess
import sys
from pathlib import Path

from sglang_hma.launch.shared_memory import FOLDER, Leftovers

HOLD = """
import multiprocessing, sys
held = multiprocessing.get_context("spawn").Semaphore()
print(held._semlock.name.strip("/"), flush=True)
sys.stdin.read()
"""


def hold() -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", HOLD]
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    return popen, FOLDER / f"sem.{popen.stdout.readline().strip()}"


def kill(popen: subprocess.Popen[str]) -> None:
    """With the resource tracker, which would unlink the semaphore."""
    children = Path(f"/proc/{popen.pid}/task/{popen.pid}/children").read_text().split()
    subprocess.run(["kill", "-9", *children, str(popen.pid)], check=True)
    popen.communicate()


def test_what_the_killed_had_mapped_goes_and_others_stay() -> None:
    (ours, our_file), (other, other_file) = hold(), hold()
    left = Leftovers()
    left.look([ours.pid])
    later, later_file = hold()
    left.look([ours.pid, later.pid])
    for popen in (ours, other, later):
        kill(popen)
    try:
        assert our_file.exists() and other_file.exists() and later_file.exists()
        left.clear()
        assert not our_file.exists() and not later_file.exists() and other_file.exists()
    finally:
        other_file.unlink()


def test_one_that_is_not_known_as_ours_at_once() -> None:
    ours, file = hold()
    left = Leftovers()
    left.look([])
    left.look([ours.pid])
    kill(ours)
    left.clear()
    assert not file.exists()
