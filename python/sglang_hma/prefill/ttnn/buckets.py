"""Batches of any composition as few shapes, so that all programs can be made before serving.

A bucket is a number of slots of equally many tokens each. A slot holds consecutive tokens of one
request and is attended by itself; everything else goes over all rows of a bucket together, so that
its weights are read once. A request takes as many slots as it needs: a bucket of 16 slots of 128
tokens serves one prompt of 2,000 tokens, or 16 of 100.

A slot begins where attention may begin (at a multiple of 128; of 32 in the slots of 32, of 256 in
those of 2,048): behind a cached prefix that ends elsewhere, its first rows stand for tokens that
are cached already.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from hma_kernels import PAGE
from sglang_hma.prefill.ttnn.chunk import Chunk, pages_of

ATTENTION_TOKENS = 128
# Rows that one operation goes over: their values fit in the memory of a Blackhole's cores.
BLOCK = 2048
# In slots of that size.
LARGE_ATTENTION_TOKENS = 256
# Integers of 4 bytes that a card reads at once: rows of a table are cut at multiples of it.
LINE = 16
# What reading the weights costs, in rows that a card multiplies in that time.
STREAM_ROWS = 256
# What a slot's own operations cost, in rows.
SLOT_ROWS = 8


@dataclass(frozen=True, order=True)
class Bucket:
    tokens: int  # of a slot
    slots: int

    @property
    def rows(self) -> int:
        return self.tokens * self.slots

    @property
    def attention(self) -> int:
        """Tokens that attention goes over at once; a slot's first position is a multiple of it."""
        return attention_tokens(self.tokens)

    @property
    def block_slots(self) -> int:
        """Slots that one operation goes over."""
        return min(self.slots, max(1, BLOCK // self.tokens))

    @property
    def block_rows(self) -> int:
        return self.block_slots * self.tokens

    @property
    def blocks(self) -> int:
        return self.slots // self.block_slots

    @property
    def cost(self) -> int:
        return STREAM_ROWS + self.rows + self.slots * SLOT_ROWS


@dataclass(frozen=True)
class Slot:
    """Tokens first..last of a chunk (counted from the chunk's own first), whose bucket's rows begin
    at position `start` of the request: `first` lies at row chunk.start + first - start."""

    chunk: int
    start: int
    first: int
    last: int


@dataclass(frozen=True)
class Group:
    """What one pass over a bucket computes; slots beyond these are empty."""

    bucket: Bucket
    slots: tuple[Slot, ...]


def attention_tokens(tokens: int) -> int:
    """In slots of `tokens`."""
    return LARGE_ATTENTION_TOKENS if tokens >= BLOCK else min(tokens, ATTENTION_TOKENS)


def buckets(chunk_tokens: int) -> list[Bucket]:
    """For batches of up to `chunk_tokens` new tokens; a batch that needs more rows takes several
    passes."""
    most = max(ATTENTION_TOKENS, -(-chunk_tokens // ATTENTION_TOKENS) * ATTENTION_TOKENS)
    found = [Bucket(PAGE, n) for n in _powers(min(32, most // PAGE))]
    found += [Bucket(ATTENTION_TOKENS, n) for n in _powers(most // ATTENTION_TOKENS)]
    found += [
        Bucket(tokens, 1)
        for tokens in _powers(BLOCK)
        if ATTENTION_TOKENS < tokens < min(2 * most, BLOCK)
    ]
    if most > BLOCK // 2:
        found += [Bucket(BLOCK, n) for n in _powers(-(-most // BLOCK))]
    return found


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to the first that is not below `limit`."""
    found = [1]
    while found[-1] < limit:
        found.append(2 * found[-1])
    return found


def pack(chunks: Sequence[Chunk], among: Sequence[Bucket]) -> list[Group]:
    """Groups that cover all chunks at the least cost among a few ways: the longest k chunks each by
    themselves and the rest together, for each k. A chunk's groups come in the order of its tokens,
    and the dearest last: its layers leave while it computes, the others' wait for it."""
    sizes = [
        sorted(bucket for bucket in among if bucket.tokens == tokens)
        for tokens in sorted({bucket.tokens for bucket in among})
    ]
    order = sorted(range(len(chunks)), key=lambda index: len(chunks[index].tokens))
    alone = [_alone(chunks[index], index, sizes) for index in order]
    together = [
        list(accumulate((_count(chunks[index], of[0].tokens) for index in order), initial=0))
        for of in sizes
    ]
    rest = list(accumulate((_cost(groups) for groups in reversed(alone)), initial=0))[::-1]

    def price(shared: int) -> tuple[int, int]:
        """The cost of the `shared` shortest together, and the number of their size of slots."""
        return min((_price(together[i][shared], of), i) for i, of in enumerate(sizes))

    shared = min(range(len(chunks) + 1), key=lambda k: price(k)[0] + rest[k])
    of = sizes[price(shared)[1]]
    slots = [slot for i in order[:shared] for slot in _slots(chunks[i], i, of[0].tokens)]
    parts = [_cut(slots, of), *alone[shared:]]
    return [group for groups in sorted(parts, key=_cost) for group in groups]


def _alone(chunk: Chunk, index: int, sizes: Sequence[Sequence[Bucket]]) -> list[Group]:
    """The cheapest of: slots of one size; as many of the largest as are full, then of one size."""
    largest = sizes[-1]
    full = (chunk.end - _begin(chunk, largest[0].tokens)) // largest[0].tokens
    ways = []
    for of in sizes:
        ways.append(_cut(list(_slots(chunk, index, of[0].tokens)), of))
        if full and of is not largest:
            slots = list(_slots(chunk, index, largest[0].tokens))[:full]
            behind = list(_slots(chunk, index, of[0].tokens, slots[-1].last))
            ways.append([*_cut(slots, largest), *_cut(behind, of)])
    return min(ways, key=_cost)


def _cost(groups: Sequence[Group]) -> int:
    return sum(group.bucket.cost for group in groups)


def _price(slots: int, of: Sequence[Bucket]) -> int:
    full, rest = divmod(slots, of[-1].slots)
    return full * of[-1].cost + (_holding(rest, of).cost if rest else 0)


def _holding(slots: int, of: Sequence[Bucket]) -> Bucket:
    return next(bucket for bucket in of if bucket.slots >= slots)


def _cut(slots: Sequence[Slot], of: Sequence[Bucket]) -> list[Group]:
    most = of[-1].slots
    cuts = [tuple(slots[begin : begin + most]) for begin in range(0, len(slots), most)]
    return [Group(_holding(len(cut), of), cut) for cut in cuts]


def _begin(chunk: Chunk, tokens: int, first: int = 0) -> int:
    """Where the slot of the chunk's token `first` begins, if it is the first slot."""
    position = chunk.start + first
    return position - position % attention_tokens(tokens)


def _count(chunk: Chunk, tokens: int) -> int:
    return -(-(chunk.end - _begin(chunk, tokens)) // tokens)


def _slots(chunk: Chunk, index: int, tokens: int, done: int = 0) -> Iterator[Slot]:
    """Of `tokens` tokens each, for the chunk's tokens from its `done`-th on."""
    for start in range(_begin(chunk, tokens, done), chunk.end, tokens):
        first = max(chunk.start + done, start)
        last = min(chunk.end, start + tokens)
        yield Slot(index, start, first - chunk.start, last - chunk.start)


def table_width(context: int, among: Sequence[Bucket]) -> int:
    """Page ids that a slot of a request of `context` tokens may reach, its empty rows included, and
    that a bucket's rows are written to; a multiple of LINE."""
    longest = max(bucket.rows for bucket in among)
    return -(-max(pages_of(context) + BLOCK // PAGE, pages_of(longest)) // LINE) * LINE


@dataclass(frozen=True)
class Inputs:
    """A group as the arrays that the card is given, int32.

    rows [3, bucket rows]: token ids; positions; and for each block the rows, counted in the block,
    of up to 32 chunks' last tokens. tables [slots + 1, width + LINE]: each slot's page ids and, at
    column `width`, its start; the last row has the pages that the rows are written to, 0 (which
    nobody reads) where a row is no new token.
    lasts: (chunk, row of the head's output) of each chunk whose last token is in the group.
    """

    rows: npt.NDArray[np.int32]
    tables: npt.NDArray[np.int32]
    lasts: tuple[tuple[int, int], ...]

    @property
    def own_pages(self) -> npt.NDArray[np.int32]:
        """[bucket rows / 32]"""
        return self.tables[-1, : self.rows.shape[1] // PAGE]


def inputs(group: Group, chunks: Sequence[Chunk], width: int, context: int) -> Inputs:
    """width: page ids of a slot at most, as `table_width` has it; context: positions that rotary
    tables have."""
    bucket = group.bucket
    rows = np.zeros((3, bucket.rows), np.int32)
    tables = np.zeros((bucket.slots + 1, width + LINE), np.int32)
    lasts: list[tuple[int, int]] = []
    taken = [0] * bucket.blocks
    for number, slot in enumerate(group.slots):
        chunk = chunks[slot.chunk]
        base = number * bucket.tokens
        begin = base + chunk.start + slot.first - slot.start
        rows[0, begin : begin + slot.last - slot.first] = chunk.tokens[slot.first : slot.last]
        positions = slot.start + np.arange(bucket.tokens)
        rows[1, base : base + bucket.tokens] = np.minimum(positions, context - 1)
        reach = -(-(chunk.start + slot.last) // PAGE)
        tables[number, :reach] = chunk.pages[:reach]
        tables[number, width] = slot.start
        own = chunk.pages[(chunk.start + slot.first) // PAGE : reach]
        tables[-1, begin // PAGE : begin // PAGE + len(own)] = own
        if slot.last == len(chunk.tokens):
            block, row = divmod(begin + slot.last - slot.first - 1, bucket.block_rows)
            rows[2, 32 * block + taken[block]] = row
            lasts.append((slot.chunk, 32 * block + taken[block]))
            taken[block] += 1
    return Inputs(rows, tables, tuple(lasts))
