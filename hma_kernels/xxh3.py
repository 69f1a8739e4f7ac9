"""XXH3-64 of many equally long blocks of memory, equal to the xxhash library's.

The library hashes one buffer a call and holds Python's lock meanwhile if it is below 100 kB, as
pages are: a forward pass in another thread would wait. Here a call takes any number of blocks, on
the host without the lock and on a GPU where they lie. The device computes accumulators, which are
merged into hashes here.
"""

import functools
import importlib
from typing import Any

import numpy as np
import torch

from hma_kernels.portable import xxh3 as portable
from hma_kernels.portable.xxh3 import Addresses, Words

MIN_BYTES = 241


def suits(length: int) -> bool:
    """Whether `xxh3_64` takes blocks of `length` bytes."""
    return length >= MIN_BYTES and length % 8 == 0


def xxh3_64(addresses: Addresses, length: int, device: torch.device) -> Words:
    """XXH3-64 of `length` bytes at each address of `device`'s memory: [n] uint64.

    On a GPU it waits for the current stream. Raises ValueError unless `length` is a multiple of 8
    above 240, as those of BFP8 pages are.
    """
    if not suits(length):
        raise ValueError(f"blocks have {length} bytes; needs a multiple of 8 above 240")
    addresses = np.ascontiguousarray(addresses, dtype=np.int64)
    out = np.empty(8 * len(addresses), dtype=np.uint64)
    if len(addresses) == 0:
        return out
    if device.type != "cpu":
        from hma_kernels.triton.xxh3 import accumulate

        out = accumulate(addresses, length, device)
    elif (compiled := _compiled()) is not None:
        compiled.hash(addresses, length, portable.KEYS.reshape(-1), portable.START, out)
    else:
        out = portable.accumulate(addresses, length)
    return portable.merge(out.reshape(-1, 8), length)


@functools.cache
def _compiled() -> Any:
    """hma_kernels.cpu, or None where it was not built."""
    try:
        return importlib.import_module("hma_kernels.cpu")
    except ImportError:
        return None
