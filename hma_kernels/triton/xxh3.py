"""The accumulators of XXH3 over blocks of GPU memory; the algorithm is in portable/xxh3.py.

The chunks of a block depend on each other, so only blocks run in parallel: one warp takes
BLOCKS_PER_WARP of them, 8 lanes each.
"""

import functools

import torch
import triton
import triton.language as tl

from hma_kernels.portable import xxh3
from hma_kernels.portable.xxh3 import Addresses, Words

BLOCKS_PER_WARP = 4

STRIPE = tl.constexpr(xxh3.STRIPE)
STRIPES = tl.constexpr(xxh3.STRIPES)
CHUNK = tl.constexpr(xxh3.CHUNK)
LANES = tl.constexpr(8)  # 64-bit accumulators of a block, and words of a stripe
PRIME32_1 = tl.constexpr(xxh3.PRIME32_1)


@triton.jit
def _stripe(acc, base, keys, word, key_row, valid):
    """The accumulators [BLOCKS, 8] after the stripe that begins at `word` of each block."""
    lane = tl.arange(0, LANES)
    data = tl.load(base[:, None] + (lane + word)[None, :], mask=valid[:, None], other=0)
    swapped = tl.load(base[:, None] + ((lane ^ 1) + word)[None, :], mask=valid[:, None], other=0)
    key = data ^ tl.load(keys + key_row * LANES + lane)[None, :]
    return acc + swapped + (key & 0xFFFFFFFF) * (key >> 32)


@triton.jit
def _accumulate(addresses, keys, start, out, count, LENGTH: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    valid = block < count
    lane = tl.arange(0, LANES)
    base = tl.load(addresses + block, mask=valid, other=0).to(tl.pointer_type(tl.uint64))
    acc = tl.zeros([BLOCKS, LANES], dtype=tl.uint64) + tl.load(start + lane)[None, :]
    CHUNKS: tl.constexpr = (LENGTH - 1) // CHUNK
    REST: tl.constexpr = (LENGTH - 1 - CHUNKS * CHUNK) // STRIPE
    for chunk in range(CHUNKS):
        for stripe in tl.static_range(STRIPES):
            word = chunk * (CHUNK // 8) + stripe * LANES
            acc = _stripe(acc, base, keys, word, stripe, valid)
        scramble = tl.load(keys + STRIPES * LANES + lane)[None, :]
        acc = (acc ^ (acc >> 47) ^ scramble) * PRIME32_1
    for stripe in tl.static_range(REST):
        word = CHUNKS * (CHUNK // 8) + stripe * LANES
        acc = _stripe(acc, base, keys, word, stripe, valid)
    acc = _stripe(acc, base, keys, (LENGTH - STRIPE) // 8, STRIPES + 1, valid)
    tl.store(out + (block * LANES)[:, None] + lane[None, :], acc, mask=valid[:, None])


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(xxh3.KEYS).to(device), torch.from_numpy(xxh3.START).to(device)


def enqueue(where: torch.Tensor, length: int, out: torch.Tensor) -> None:
    """where: int64 [blocks] addresses on the GPU. out: uint64 [blocks, 8], written."""
    keys, start = _tables(out.device)
    grid = (triton.cdiv(len(where), BLOCKS_PER_WARP),)
    _accumulate[grid](
        where, keys, start, out, len(where), LENGTH=length, BLOCKS=BLOCKS_PER_WARP, num_warps=1
    )


def accumulate(addresses: Addresses, length: int, device: torch.device) -> Words:
    """[blocks, 8] uint64 on the host; waits for the current stream."""
    where = torch.from_numpy(addresses).to(device)
    out = torch.empty((len(addresses), 8), dtype=torch.uint64, device=device)
    enqueue(where, length, out)
    words: Words = out.cpu().numpy()
    return words
