"""Real processes that compute, wait, stop and end; the clock is the test's."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_hma.launch.pulse import ENDED, STOPPED, Pulse, state

from .fleet import until

EVERY_S = 5.0
SPIN = """
print(flush=True)
while True:
    pass
"""
WAIT = """
import time
print(flush=True)
time.sleep(3600)
"""
SPIN_BESIDE = f"""
import threading
threading.Thread(target=exec, args=("while True: pass",)).start()
{WAIT}
"""
Begin = Callable[[str], int]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """The pid of a Python process that runs `code`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> int:
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        assert started[-1].stdout is not None
        started[-1].stdout.readline()
        return started[-1].pid

    yield start
    for popen in started:
        popen.kill()
        popen.communicate()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("code", [SPIN, SPIN_BESIDE])
def test_what_computes_is_busy(begin: Begin, code: str) -> None:
    pid, clock = begin(code), Clock()
    pulse = Pulse(pid, EVERY_S, clock)
    for _ in range(3):
        before = cpu_s(pid)
        until(lambda before=before: cpu_s(pid) > before + 0.5)
        clock.now += 0.6
        assert pulse.look(answered=False) == 0


def test_what_waits_is_silent_until_it_answers(begin: Begin) -> None:
    pid, clock = begin(WAIT), Clock()
    pulse = Pulse(pid, EVERY_S, clock)
    silent = []
    for answered in (False, False, True, False):
        clock.now += EVERY_S
        silent.append(pulse.look(answered))
    assert silent == [5, 10, 0, 5]


def test_a_pause_of_the_one_who_looks_counts_little(begin: Begin) -> None:
    pid, clock = begin(WAIT), Clock()
    pulse = Pulse(pid, EVERY_S, clock)
    clock.now += 3600
    assert pulse.look(answered=False) == 2 * EVERY_S


def test_states(begin: Begin) -> None:
    pid = begin(SPIN)
    assert state(pid) not in STOPPED + ENDED
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state(pid) in STOPPED)
    os.kill(pid, signal.SIGKILL)
    until(lambda: state(pid) in ENDED)  # a zombie, as long as nobody waits for it
    assert state(2**22 + 1) in ENDED
