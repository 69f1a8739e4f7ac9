"""What decode attention is held to: the machine's bandwidth of streaming reads.

Threads sum 64-byte loads of a buffer far larger than the last cache, each its share of it. How many
places a thread reads from at a time makes up to twice the difference, so several are tried, and
the fastest counts.
"""

import ctypes
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

BYTES = 1 << 29
STREAMS = (1, 2, 4, 8)


def _build() -> Callable[[int, int, int], int]:
    source = Path(__file__).with_suffix(".cpp")
    library = Path("build/bench/streaming.so").absolute()
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-Wno-psabi"]
    subprocess.run(["c++", *flags, "-o", str(library), str(source)], check=True)
    read = ctypes.CDLL(str(library)).streaming_read
    read.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
    read.restype = ctypes.c_uint64
    return read


class StreamingRead:
    """Candidates for benchmark.common.interleave; each call reads BYTES."""

    def __init__(self, threads: int) -> None:
        self._read = _build()
        self._memory = torch.ones(BYTES, dtype=torch.uint8)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def candidates(self) -> dict[str, Callable[[], object]]:
        return {f"read, {n} at a time": lambda n=n: self._run(n) for n in STREAMS}

    def _run(self, streams: int) -> None:
        share = BYTES // self._threads // 64 * 64
        starts = [self._memory.data_ptr() + i * share for i in range(self._threads)]
        list(self._pool.map(lambda start: self._read(start, share // 64, streams), starts))
