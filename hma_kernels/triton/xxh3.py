"""The accumulators of XXH3 over blocks of GPU memory; the algorithm is in portable/xxh3.py.

A block's chunks depend on each other, so blocks run in parallel: one warp takes BLOCKS_A_WARP of
them, 8 lanes each.
"""

import functools

import torch
import triton
import triton.language as tl

from hma_kernels.portable.xxh3 import KEYS, START, Addresses, Words

BLOCKS_A_WARP = 4


@triton.jit
def _stripe(acc, base, keys, word, row, live):
    lane = tl.arange(0, 8)
    data = tl.load(base[:, None] + (word + lane)[None, :], mask=live[:, None], other=0)
    swapped = tl.load(base[:, None] + (word + (lane ^ 1))[None, :], mask=live[:, None], other=0)
    key = data ^ tl.load(keys + row * 8 + lane)[None, :]
    return acc + swapped + (key & 0xFFFFFFFF) * (key >> 32)


@triton.jit
def _accumulate(addresses, keys, start, out, count, LENGTH: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < count
    lane = tl.arange(0, 8)
    base = tl.load(addresses + block, mask=live, other=0).to(tl.pointer_type(tl.uint64))
    acc = tl.zeros([BLOCKS, 8], dtype=tl.uint64) + tl.load(start + lane)[None, :]
    CHUNKS: tl.constexpr = (LENGTH - 1) // 1024
    REST: tl.constexpr = (LENGTH - 1 - CHUNKS * 1024) // 64
    for chunk in range(CHUNKS):
        for stripe in tl.static_range(16):
            acc = _stripe(acc, base, keys, chunk * 128 + stripe * 8, stripe, live)
        acc = (acc ^ (acc >> 47) ^ tl.load(keys + 16 * 8 + lane)[None, :]) * 0x9E3779B1
    for stripe in tl.static_range(REST):
        acc = _stripe(acc, base, keys, CHUNKS * 128 + stripe * 8, stripe, live)
    acc = _stripe(acc, base, keys, (LENGTH - 64) // 8, 17, live)
    tl.store(out + (block * 8)[:, None] + lane[None, :], acc, mask=live[:, None])


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(KEYS).to(device), torch.from_numpy(START).to(device)


def accumulate(addresses: Addresses, length: int, device: torch.device) -> Words:
    """[blocks, 8] uint64 on the host; waits for the current stream."""
    keys, start = _tables(device)
    where = torch.from_numpy(addresses).to(device)
    out = torch.empty((len(addresses), 8), dtype=torch.uint64, device=device)
    grid = (triton.cdiv(len(addresses), BLOCKS_A_WARP),)
    _accumulate[grid](
        where, keys, start, out, len(addresses), LENGTH=length, BLOCKS=BLOCKS_A_WARP, num_warps=1
    )
    words: Words = out.cpu().numpy()
    return words
