"""Batches of any composition as buckets: every new token has one row, and its page is written."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.tenstorrent.driven import config_of
from hma_kernels import PAGE
from sglang_hma.prefill.ttnn.buckets import BLOCK, Bucket, buckets, inputs, pack, table_width
from sglang_hma.prefill.ttnn.chunk import Chunk, pages_of
from sglang_hma.prefill.ttnn.lane import (
    SEGMENTS,
    lane_bytes,
    memory_of,
    segments,
    traced_buckets,
)
from sglang_hma.prefill.ttnn.shape import ModelShape

CONTEXT = 16384


@st.composite
def batches(draw: Any) -> tuple[int, list[Chunk]]:
    """Chunk size and requests, each of which has pages of its own."""
    chunk_tokens = draw(st.sampled_from([64, 128, 512, 2048, 8192]))
    lengths = draw(st.lists(st.integers(1, chunk_tokens), min_size=1, max_size=12))
    starts = draw(st.lists(st.integers(0, 200), min_size=len(lengths), max_size=len(lengths)))
    ids = draw(st.randoms(use_true_random=False))
    found, page = [], 1
    for length, begin in zip(lengths, starts, strict=True):
        need = begin + pages_of(length)
        tokens = np.array([ids.randrange(1, 1000) for _ in range(length)])
        found.append(Chunk(tokens, begin * PAGE, np.arange(page, page + need)))
        page += need
    return chunk_tokens, found


@given(batches())
def test_every_token_has_one_row(batch: tuple[int, list[Chunk]]) -> None:
    chunk_tokens, chunks = batch
    among = buckets(chunk_tokens)
    width = table_width(CONTEXT, among)
    done = [0] * len(chunks)
    last = [False] * len(chunks)
    written: dict[int, tuple[int, int]] = {}
    for group in pack(chunks, among):
        bucket = group.bucket
        assert bucket in among and len(group.slots) <= bucket.slots
        given_ = inputs(group, chunks, width, CONTEXT)
        assert given_.rows.shape == (3, bucket.rows)
        assert given_.tables.shape == (bucket.slots + 1, width + 16)
        own = given_.own_pages.repeat(PAGE)
        for number, slot in enumerate(group.slots):
            chunk = chunks[slot.chunk]
            assert slot.first == done[slot.chunk] < slot.last, "tokens come in order"
            done[slot.chunk] = slot.last
            assert slot.start % bucket.attention == 0
            assert given_.tables[number, width] == slot.start
            rows = np.arange(slot.first, slot.last) + chunk.start - slot.start
            assert rows[0] >= 0 and rows[-1] < bucket.tokens
            rows += number * bucket.tokens
            where = np.arange(slot.first, slot.last) + chunk.start
            assert np.array_equal(given_.rows[0, rows], chunk.tokens[slot.first : slot.last])
            assert np.array_equal(given_.rows[1, rows], where)
            assert np.array_equal(own[rows], chunk.pages[where // PAGE])
            reach = pages_of(int(where[-1]) + 1)
            assert np.array_equal(given_.tables[number, :reach], chunk.pages[:reach])
            own[rows] = 0
            for page, position in zip(chunk.pages[where // PAGE], where // PAGE, strict=True):
                assert written.setdefault(int(page), (slot.chunk, position)) == (
                    slot.chunk,
                    position,
                )
        # What is no new token is written where nobody reads, or behind a request's last token.
        behind = {int(c.pages[pages_of(c.end) - 1]) for c in chunks}
        assert set(own[own != 0].tolist()) <= behind
        for index, row in given_.lasts:
            block, place = divmod(row, 32)
            at = block * bucket.block_rows + given_.rows[2, row]
            assert place < 32 and given_.rows[0, at] == chunks[index].tokens[-1]
            assert given_.rows[1, at] == chunks[index].end - 1 and not last[index]
            last[index] = True
    assert done == [len(chunk.tokens) for chunk in chunks] and all(last)


@pytest.mark.parametrize("number", [1, 8, 32])
@pytest.mark.parametrize("tokens", [20, 100])
def test_weights_are_read_once_for_a_batch_of_short_prompts(number: int, tokens: int) -> None:
    chunk = Chunk(np.zeros(tokens, int), 0, np.arange(pages_of(tokens)))
    (group,) = pack([chunk] * number, buckets(8192))
    assert group.bucket.rows <= 128 * number


def test_a_prompt_that_fills_a_chunk_is_one_pass_and_a_late_start_adds_a_small_one() -> None:
    tokens = np.zeros(8192, int)
    (group,) = pack([Chunk(tokens, 0, np.arange(256))], buckets(8192))
    assert group.bucket == Bucket(2048, 4)
    whole, rest = pack([Chunk(tokens, 96, np.arange(259))], buckets(8192))
    assert (whole.bucket, rest.bucket) == (Bucket(2048, 4), Bucket(128, 1))


@pytest.mark.parametrize("chunk_tokens", [32, 512, 2048, 8192, 16384])
def test_buckets_are_few_and_hold_a_chunk(chunk_tokens: int) -> None:
    among = buckets(chunk_tokens)
    assert len(set(among)) == len(among) <= 21
    assert max(bucket.rows for bucket in among) >= chunk_tokens
    for bucket in among:
        assert bucket.blocks * bucket.block_rows == bucket.rows and bucket.block_rows <= BLOCK
        assert bucket.block_slots <= 32


@given(st.integers(1, 100))
def test_segments_end_with_single_layers(layers: int) -> None:
    parts = segments(layers)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert len(parts[-1]) == 1 and len(parts) == min(layers, SEGMENTS)


def test_traces_take_a_twelfth_of_a_cards_memory_at_most() -> None:
    shape = ModelShape.of(config_of("Qwen3-8B"))
    among = buckets(8192)
    width = table_width(40960, among)
    most = {}
    for memory in (0, 12 << 30, 24 << 30, 32 << 30):
        traced = traced_buckets(among, shape, width, memory)
        taken = sum(lane_bytes(bucket, shape, width, traced=True) for bucket in traced)
        assert taken <= memory // 12
        every = memory_of(among, shape, width, memory)
        assert taken <= every <= taken + (1 << 30)
        most[memory >> 30] = max((bucket.rows for bucket in traced), default=0)
    assert most == {0: 0, 12: 2048, 24: 4096, 32: 8192}
