"""Heads that prefill and decode ranks share differently: pieces of pages against array slicing."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hma_kernels import TILE_BYTES
from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer.page_slices import check_page_bytes, piece, runs, unsupported

FORMAT = KVFormat.bfp8(kv_heads=8, head_dim=128, v_head_dim=128, layers=36)
NATIVE = KVFormat.native(
    dtype="bfloat16", kv_heads=8, head_dim=128, v_head_dim=128, layers=36, page=32
)


@given(st.integers(1, 4), st.sampled_from(["prefill", "decode", "both"]), st.integers(0, 2**32 - 1))
def test_every_head_lands_where_its_rank_expects_it(ranks: int, split: str, seed: int) -> None:
    rng = random.Random(seed)
    heads, pages, used = ranks * rng.randrange(1, 3), 9, rng.randrange(1, 6)
    prefill_tp = ranks if split in ("prefill", "both") else 1
    decode_tp = ranks if split in ("decode", "both") else 1
    source = np.random.default_rng(seed).integers(
        0, 256, (pages, heads, TILE_BYTES), dtype=np.uint8
    )
    # Each rank's own registered buffer: its heads only.
    ours = [np.ascontiguousarray(part) for part in np.split(source, prefill_tp, axis=1)]
    theirs = [np.zeros_like(part) for part in np.split(source, decode_tp, axis=1)]
    send = np.array(rng.sample(range(pages), used), dtype=np.int32)
    receive = np.array(rng.sample(range(pages), used), dtype=np.int32)
    bases = {id(a): int(a.ctypes.data) for a in (*ours, *theirs)}
    every = {bases[id(a)]: a.reshape(-1) for a in (*ours, *theirs)}

    def view(address: int, length: int) -> np.ndarray:
        base = max(b for b in every if b <= address)
        return every[base][address - base : address - base + length]

    for p, mine in enumerate(ours):
        for d, other in enumerate(theirs):
            if prefill_tp == decode_tp and p != d:
                continue
            cut = piece(
                bases[id(mine)],
                bases[id(other)],
                mine[0].nbytes,
                ours=(p, prefill_tp),
                theirs=(d, decode_tp),
            )
            assert cut.whole == (prefill_tp == decode_tp)
            parts = runs(send, receive)
            blocks = cut.blocks(parts)
            assert len(blocks) == cut.count(parts)
            for at, to, length in blocks:
                view(to, length)[:] = view(at, length)
    landed = np.concatenate(theirs, axis=1)
    assert (landed[receive] == source[send]).all()
    rest = np.setdiff1d(np.arange(pages), receive)
    assert not landed[rest].any()


@pytest.mark.parametrize("sizes", [(1, 1), (4, 4), (3, 3), (1, 2), (2, 1), (1, 8), (8, 1)])
def test_supported(sizes: tuple[int, int]) -> None:
    assert unsupported(FORMAT, *sizes) is None


@pytest.mark.parametrize(
    ("fmt", "sizes", "words"),
    [
        (FORMAT, (2, 4), "only if one of them is 1"),
        (FORMAT, (4, 2), "only if one of them is 1"),
        (FORMAT, (1, 16), "8 KV heads cannot be cut into 16"),
        (FORMAT, (3, 1), "8 KV heads cannot be cut into 3"),
        (FORMAT, (1, 10**9), "only if one of them is 1"),
        (NATIVE, (1, 2), "native-bfloat16 pages"),
    ],
)
def test_refused_in_one_line(fmt: KVFormat, sizes: tuple[int, int], words: str) -> None:
    reason = unsupported(fmt, *sizes)
    assert reason is not None and words in reason and "\n" not in reason
    assert "--tp-size" in reason and str(sizes[0]) in reason


def test_page_sizes_are_compared_over_all_ranks() -> None:
    assert check_page_bytes([4352, 4352], [1088, 1088], 1, 4) is None
    assert check_page_bytes([1088, 1088], [4352, 4352], 4, 1) is None
    assert check_page_bytes([4352, 4352], [], 1, 1) is None  # an older peer that does not say
    reason = check_page_bytes([4352, 4352], [1088, 2176], 1, 4)
    assert reason is not None and "2176 bytes" in reason
