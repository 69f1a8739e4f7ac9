"""Runs of pages, blocks, and the slices that ranks share, against brute force and array slicing."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hma_kernels import TILE_BYTES
from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer.page_slices import (
    Buffers,
    PageRun,
    PageSlice,
    SlicePair,
    check_page_bytes,
    page_runs,
    slice_pairs,
    unsupported,
)

FORMAT = KVFormat.bfp8(kv_heads=8, head_dim=128, v_head_dim=128, layers=36)
NATIVE = KVFormat.native(
    dtype="bfloat16", kv_heads=8, head_dim=128, v_head_dim=128, layers=36, page=32
)

page_pairs = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=30)


@given(page_pairs)
def test_runs_cover_the_lists_and_cannot_be_longer(pairs: list[tuple[int, int]]) -> None:
    source = np.array([a for a, _ in pairs], dtype=np.int32)
    target = np.array([b for _, b in pairs], dtype=np.int32)
    found = page_runs(source, target)
    flat = [(run.source + i, run.target + i) for run in found for i in range(run.pages)]
    assert flat == pairs
    for left, right in pairwise(found):
        assert (left.source + left.pages, left.target + left.pages) != (right.source, right.target)


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 source pages for 1"):
        page_runs(np.zeros(2, np.int32), np.zeros(1, np.int32))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 4)), max_size=4),
    st.sampled_from([(24, 24, 24), (24, 8, 8), (8, 24, 8)]),
)
def test_blocks_copy_the_right_bytes(
    drawn: list[tuple[int, int, int]], strides: tuple[int, int, int]
) -> None:
    source_stride, target_stride, length = strides
    source = np.random.default_rng(0).integers(0, 256, 14 * source_stride + 8, dtype=np.uint8)
    target = np.zeros(14 * target_stride + 8, dtype=np.uint8)
    expected = target.copy()
    pair = SlicePair(PageSlice(8, source_stride, length), PageSlice(8, target_stride, length))
    runs = [PageRun(*run) for run in drawn]
    for run in runs:
        for i in range(run.pages):
            at, to = 8 + (run.source + i) * source_stride, 8 + (run.target + i) * target_stride
            expected[to : to + length] = source[at : at + length]
    blocks = pair.blocks(runs)
    for at, to, count in blocks:
        target[to : to + count] = source[at : at + count]
    assert np.array_equal(target, expected)
    assert pair.block_count(runs) == len(blocks)


@given(st.integers(1, 4), st.sampled_from(["prefill", "decode", "both"]), st.integers(0, 2**32 - 1))
def test_every_head_lands_where_its_rank_expects_it(ranks: int, split: str, seed: int) -> None:
    rng = random.Random(seed)
    layers, heads, pages, used = 2, ranks * rng.randrange(1, 3), 9, rng.randrange(1, 6)
    prefill_tp = ranks if split in ("prefill", "both") else 1
    decode_tp = ranks if split in ("decode", "both") else 1
    # K of every layer, then V of every layer.
    shape = 2 * layers, pages, heads, TILE_BYTES
    source = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    # Each rank's own registered buffers: its heads only.
    ours = [np.ascontiguousarray(part) for part in np.split(source, prefill_tp, axis=2)]
    theirs = [np.zeros_like(part) for part in np.split(source, decode_tp, axis=2)]
    send = np.array(rng.sample(range(pages), used), dtype=np.int32)
    receive = np.array(rng.sample(range(pages), used), dtype=np.int32)
    flat = {int(rank.ctypes.data): rank.reshape(-1) for rank in (*ours, *theirs)}

    def view(address: int, length: int) -> np.ndarray:
        base = max(start for start in flat if start <= address)
        return flat[base][address - base : address - base + length]

    def addresses(rank: np.ndarray) -> tuple[int, ...]:
        return tuple(int(buffer.ctypes.data) for buffer in rank)

    for p, mine in enumerate(ours):
        buffers = Buffers(addresses(mine), (mine[0, 0].nbytes,) * 2 * layers)
        for d, other in enumerate(theirs):
            if prefill_tp == decode_tp and p != d:
                continue
            ranks_of = {"prefill": (p, prefill_tp), "decode": (d, decode_tp)}
            for pair in sum(slice_pairs(buffers, addresses(other), **ranks_of), ()):
                assert pair.whole_pages == (prefill_tp == decode_tp)
                for at, to, length in pair.blocks(page_runs(send, receive)):
                    view(to, length)[:] = view(at, length)
    landed = np.concatenate(theirs, axis=2)
    assert (landed[:, receive] == source[:, send]).all()
    assert not landed[:, np.setdiff1d(np.arange(pages), receive)].any()


def test_a_layer_is_its_k_and_v_buffer() -> None:
    buffers = Buffers((1000, 2000, 3000, 4000), (64, 64, 32, 32))
    assert buffers.layers == 2
    assert buffers.slices(1) == [PageSlice(2000, 64, 64), PageSlice(4000, 32, 32)]
    assert buffers.slices(1, 1, 4) == [PageSlice(2016, 64, 16), PageSlice(4008, 32, 8)]
    pages = np.array([0, 3, 1], dtype=np.int32)
    assert buffers.slices(1, 1, 4)[0].addresses(pages).tolist() == [2016, 2208, 2080]


def test_peers_with_other_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="4 source buffers for 2"):
        slice_pairs(Buffers((0,) * 4, (64,) * 4), (0, 0), prefill=(0, 1), decode=(0, 1))


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
