"""A pair of servers on one box that do not share cores, as two hosts would not."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmark.serving.pair import pair

ROLE = "--disaggregation-mode"


@contextmanager
def separate_pair(model: Path, port: int, log: Path, flags: Sequence[str]) -> Iterator[str]:
    """launch_pd's pair, its URL. The prefill server has the first half of this process's cores;
    the decode server, the router and this process, which asks, have the others."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("a core is too few for a pair that shares none: needs 2")
    first, second = cores[: len(cores) // 2], cores[len(cores) // 2 :]
    with pair(model, port, log, flags) as url:
        everyone = psutil.Process().children(recursive=True)
        prefill = set(_families(each for each in everyone if _is_prefill(each)))
        for process in everyone:
            _pin(process.pid, first if process in prefill else second)
        _pin(os.getpid(), second)
        try:
            yield url
        finally:
            _pin(os.getpid(), cores)


def _is_prefill(process: psutil.Process) -> bool:
    words = process.cmdline()
    return ROLE in words and words[words.index(ROLE) + 1] == "prefill"


def _families(processes: Iterable[psutil.Process]) -> Iterator[psutil.Process]:
    for process in processes:
        yield from (process, *process.children(recursive=True))


def _pin(pid: int, cores: Sequence[int]) -> None:
    """All threads; those that they start later are born there."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), cores)
