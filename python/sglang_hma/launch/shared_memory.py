"""What a run's killed processes leave in /dev/shm: nobody unlinks it for them.

Names tell nothing about whose they are, so a file is the run's if a process of the run has been
seen to map it.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

FOLDER = Path("/dev/shm")
# Semaphores and memory of Python's multiprocessing; SGLang's snapshots of its load, and segments.
PREFIXES = ("sem.mp-", "psm_", "sglang_loads_", "sgl_shm_", "multi_tokenizer_args_")


class Leftovers:
    """Call `look` now and then while the run lives, `clear` when its processes are gone."""

    def __init__(self) -> None:
        self._ours: dict[str, int] = {}  # inode by name
        self._seen: dict[str, int] = {}

    def look(self, pids: Iterable[int]) -> None:
        """`pids`: the run's processes. Their maps are read only if there are new files."""
        files = _files()
        new = {name for name in files if self._seen.get(name, 0) < 2} - self._ours.keys()
        if not new:
            return
        # A process inside execve is not known as the run's for a moment, hence twice.
        self._seen |= {name: self._seen.get(name, 0) + 1 for name in new}
        mapped = set(chain(*map(_mapped, pids)))
        self._ours |= {name: files[name] for name in new if files[name] in mapped}

    def clear(self) -> None:
        for name, inode in self._ours.items():
            with contextlib.suppress(OSError):
                if (FOLDER / name).stat().st_ino == inode:
                    (FOLDER / name).unlink()


def _files() -> dict[str, int]:
    try:
        with os.scandir(FOLDER) as entries:
            return {each.name: each.inode() for each in entries if each.name.startswith(PREFIXES)}
    except OSError:
        return {}


def _mapped(pid: int) -> Iterator[int]:
    """Inodes of files in FOLDER. A semaphore is mapped under a name that it has no more."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            if f" {FOLDER}/" in line:
                yield int(line.split(maxsplit=5)[4])
