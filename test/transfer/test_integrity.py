"""Checksums on both sides: any flipped byte is found, asked for again, and given up in the end."""

import random
import struct

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer import messages
from sglang_hma.transfer.integrity import (
    MAX_RESENDS,
    CorruptPages,
    HostMemory,
    Verifier,
    digests,
)
from sglang_hma.transfer.page_slices import Buffers, PageSlice

LAYERS, PAGES, SIZE = 3, 12, 288


def expected_digest(blocks: np.ndarray) -> int:
    """XXH3 over the XXH3 of each row of [n, bytes], by the library alone."""
    hashes = [struct.pack("<Q", xxhash.xxh3_64_intdigest(row.tobytes())) for row in blocks]
    return xxhash.xxh3_64_intdigest(b"".join(hashes))


class Decode:
    """A decode server's pages in plain memory."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.data = rng.integers(0, 256, (2 * LAYERS, PAGES, SIZE), dtype=np.uint8)
        addresses = tuple(int(buffer.ctypes.data) for buffer in self.data)
        self.verifier = Verifier([Buffers(addresses, (SIZE,) * (2 * LAYERS))], HostMemory())

    def landed(
        self, generation: int, pages: np.ndarray, first: int, count: int, layers: slice
    ) -> messages.Landed:
        """What an honest sender says, computed without the code under test."""
        found = [
            expected_digest(self.data[kv * LAYERS + layer, pages[first : first + count]])
            for layer in range(layers.start, layers.stop)
            for kv in (0, 1)
        ]
        return messages.Landed(
            9, generation, 0, layers.start, layers.stop - layers.start, first, count, found, 0
        )


@given(st.integers(0, 2**32 - 1))
def test_complete_only_when_all_was_compared(seed: int) -> None:
    rng = random.Random(seed)
    decode = Decode(seed)
    pages = np.array(rng.sample(range(PAGES), rng.randrange(1, PAGES)), dtype=np.int32)
    decode.verifier.expect(9, 5, [pages], 1)
    ranges = []
    cut = rng.randrange(len(pages) + 1)
    for first, count in ((0, cut), (cut, len(pages) - cut)):
        if count:
            middle = rng.randrange(LAYERS + 1)
            for layers in (slice(0, middle), slice(middle, LAYERS)):
                if layers.start < layers.stop:
                    ranges.append(decode.landed(5, pages, first, count, layers))
    rng.shuffle(ranges)
    for landed in ranges:
        assert not decode.verifier.complete(9)
        assert decode.verifier.compare(landed, "s") is None
        assert decode.verifier.compare(landed, "s") is None  # a repetition counts once
    assert decode.verifier.complete(9)
    decode.verifier.forget(9)
    assert decode.verifier.complete(9)


@given(st.integers(0, 2**32 - 1))
def test_any_flipped_byte_is_found_and_the_range_asked_for_again(seed: int) -> None:
    rng = random.Random(seed)
    decode = Decode(seed)
    pages = np.arange(3, 9, dtype=np.int32)
    decode.verifier.expect(9, 5, [pages], 1)
    landed = decode.landed(5, pages, 1, 5, slice(1, 3))
    kv, layer = rng.randrange(2), rng.randrange(1, 3)
    page, byte = rng.randrange(4, 9), rng.randrange(SIZE)
    damaged = decode.data[kv * LAYERS + layer, page]
    flipped = rng.randrange(1, 256)
    damaged[byte] ^= flipped
    resend = decode.verifier.compare(landed, "10.0.0.2:15000")
    assert resend == messages.Resend(9, 5, "10.0.0.2:15000", 1, 2, 1, 5, 1)
    for attempt in range(1, MAX_RESENDS):
        assert decode.verifier.compare(landed, "s") is None, "what was sent first, announced twice"
        landed = msgspec.structs.replace(landed, attempt=attempt)
        assert decode.verifier.compare(landed, "s").attempt == attempt + 1
    landed = msgspec.structs.replace(landed, attempt=MAX_RESENDS)
    with pytest.raises(CorruptPages, match=r"pages 1\.\.5 of layers 1\.\.2 arrived with wrong"):
        decode.verifier.compare(landed, "s")
    damaged[byte] ^= flipped
    assert decode.verifier.compare(landed, "s") is None


def test_other_generations_and_rooms_say_nothing() -> None:
    decode = Decode(1)
    pages = np.arange(2, dtype=np.int32)
    decode.verifier.expect(9, 5, [pages], 1)
    late = decode.landed(4, pages, 0, 2, slice(0, LAYERS))
    assert decode.verifier.compare(late, "s") is None and not decode.verifier.complete(9)


@pytest.mark.parametrize(
    ("first", "count", "layers", "digests"),
    [(1, 2, slice(0, 1), 2), (0, 2, slice(2, 4), 4), (0, 2, slice(0, 1), 3)],
)
def test_ranges_outside_the_request_are_refused(
    first: int, count: int, layers: slice, digests: int
) -> None:
    decode = Decode(1)
    decode.verifier.expect(9, 5, [np.arange(2, dtype=np.int32)], 1)
    span = layers.start, layers.stop - layers.start, first, count
    with pytest.raises(CorruptPages, match="announced layers"):
        decode.verifier.compare(messages.Landed(9, 5, 0, *span, [0] * digests, 0), "s")


def test_each_kind_of_pages_has_its_own_list() -> None:
    """Of layers with a window fewer layers and pages: what is in order for one kind is not for the
    other, and a request is complete with both."""
    decode, window = Decode(1), np.random.default_rng(2).integers(0, 256, (2, 4, SIZE), np.uint8)
    full = decode.verifier.buffers[0]
    addresses = tuple(int(buffer.ctypes.data) for buffer in window)
    verifier = Verifier([full, Buffers(addresses, (SIZE,) * 2)], HostMemory())
    pages, seen = np.array([7, 3, 5], dtype=np.int32), np.array([2], dtype=np.int32)
    verifier.expect(9, 5, [pages, seen], 1)
    whole = decode.landed(5, pages, 0, 3, slice(0, LAYERS))
    assert verifier.compare(whole, "s") is None and not verifier.complete(9)
    found = [expected_digest(window[kv, seen]) for kv in (0, 1)]
    wrong = messages.Landed(9, 5, 0, 0, 1, 0, 1, found[::-1], 0, kind=1)
    asked = verifier.compare(wrong, "s")
    assert asked is not None and (asked.kind, asked.layers, asked.pages) == (1, 1, 1)
    assert not verifier.complete(9)
    for span in ((0, 2, 0, 1), (0, 1, 0, 2), (1, 1, 0, 1)):
        with pytest.raises(CorruptPages, match="the request has 1 layers and 1 pages"):
            verifier.compare(messages.Landed(9, 5, 0, *span, [0] * 2 * span[1], 0, kind=1), "s")
    right = messages.Landed(9, 5, 0, 0, 1, 0, 1, found, 1, kind=1)
    assert verifier.compare(right, "s") is None and verifier.complete(9)
    one_pool = Verifier([full], HostMemory())
    one_pool.expect(9, 5, [pages], 1)
    with pytest.raises(CorruptPages, match="pages of a window, and there is one pool"):
        one_pool.compare(right, "s")


@given(st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_slices_of_pages_from_several_ranks(ranks: int, seed: int) -> None:
    decode = Decode(seed)
    size = SIZE // ranks
    pages = np.array([4, 2, 3], dtype=np.int32)
    decode.verifier.expect(9, 5, [pages], ranks)
    for rank in range(ranks):
        assert not decode.verifier.complete(9)
        found = [
            expected_digest(decode.data[index][pages, rank * size : (rank + 1) * size])
            for layer in range(LAYERS)
            for index in (layer, LAYERS + layer)
        ]
        landed = messages.Landed(9, 5, rank, 0, LAYERS, 0, 3, found, 0)
        assert decode.verifier.compare(landed, "s") is None
    assert decode.verifier.complete(9)


def test_metadata_of_several_ranks_is_what_the_last_of_them_wrote() -> None:
    """All write the same row. They need not agree on the last bit of a logprob."""
    rows = np.arange(64, dtype=np.uint8).reshape(4, 16)
    made = Verifier(
        Decode(1).verifier.buffers, HostMemory(), [PageSlice.part(int(rows.ctypes.data), 16)]
    )
    made.expect(9, 5, [np.empty(0, dtype=np.int32)], 2, row=2)
    right = xxhash.xxh3_64_intdigest(rows[2].tobytes())
    made.note_metadata(messages.Metadata(9, 4, 0, 1, right))
    made.note_metadata(messages.Metadata(9, 5, 0, 1, right))
    made.note_metadata(messages.Metadata(9, 5, 0, 1, right))
    assert not made.complete(9), "one rank of two has told"
    made.note_metadata(messages.Metadata(9, 5, 1, 1, right ^ 1))
    assert made.complete(9)
    made.check_metadata(9)
    for change in (lambda: rows[2].__setitem__(3, 0), lambda: rows[2].__setitem__(3, 99)):
        change()
        with pytest.raises(CorruptPages, match="first token"):
            made.check_metadata(9)
    made.expect(9, 6, [np.empty(0, dtype=np.int32)], 1, row=2)
    made.note_metadata(messages.Metadata(9, 6, 0, 2, right))
    with pytest.raises(CorruptPages, match="first token"):
        made.check_metadata(9)


@given(st.integers(1, 400), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_slices_of_any_length_hash_as_the_library_does(length: int, count: int, seed: int) -> None:
    """Lengths that the kernels take and lengths that they do not, in one call."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (8, 1000), dtype=np.uint8)
    pages = rng.permutation(8)[:count].astype(np.int32)
    spans = [(0, length), (length, 264), (500, length)]
    base = int(data.ctypes.data)
    found = digests(HostMemory(), [PageSlice(base + at, 1000, size) for at, size in spans], pages)
    assert found == [expected_digest(data[pages, at : at + size]) for at, size in spans]
