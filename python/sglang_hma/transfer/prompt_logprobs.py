"""Logprobs that prefill computes, and decode answers with: of a prompt's tokens, and beside the
first token of the answer.

SGLang leaves a prompt's in prefill's answer, from which its router puts those of the prompt's own
tokens before decode's, and drops the others; of the first token it sends 128 top ones and none of
those that were asked for by id. Here they travel to decode before prefill says that all is sent. A
row is a position's: its token's logprob, those of the top tokens, those of the tokens that were
asked for. The first position of a prompt has none.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

# Of SGLang's ReqLogprob.
OF_PROMPT = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
OF_FIRST = ("output_top_logprobs", "output_token_ids_logprobs")  # one row
KINDS = (*OF_PROMPT, *OF_FIRST)
MAX_BYTES = 64 << 20  # of one request
PART_BYTES = 512 << 10
MAX_PARTS = MAX_BYTES // PART_BYTES
NONE = -1  # in the place of a token, where a row has no number

Width = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]


class Table(msgspec.Struct, frozen=True, array_like=True):
    """float32 and int32 [rows, width]; `plain`: a row is one number, not a list of them."""

    width: Width
    plain: bool
    values: bytes
    tokens: bytes


class Packed(msgspec.Struct, frozen=True, array_like=True):
    """One table for each of KINDS, or None."""

    tables: Annotated[list[Table | None], msgspec.Meta(min_length=5, max_length=5)]


def pack(logprob: Any) -> bytes:
    """Of SGLang's ReqLogprob. Raises ValueError if they are too many to send."""
    tables = [
        _table(getattr(logprob, f"{kind}_val"), getattr(logprob, f"{kind}_idx")) for kind in KINDS
    ]
    packed = msgspec.msgpack.encode(Packed(tables))
    if len(packed) > MAX_BYTES:
        raise ValueError(
            f"the prompt's logprobs take {len(packed)} bytes, and {MAX_BYTES} are the most: ask "
            "for fewer (logprob_start_len, top_logprobs_num)"
        )
    return packed


def unpack(packed: bytes, vocabulary: int) -> dict[str, list[Any]]:
    """The fields of ReqLogprob. Raises ValueError for what is none."""
    found: dict[str, list[Any]] = {}
    for kind, table in zip(KINDS, msgspec.msgpack.decode(packed, type=Packed).tables, strict=True):
        if table is None:
            continue
        values, tokens = _numbers(table, vocabulary)
        found[f"{kind}_val"] = [_row(row, table.plain) for row in _listed(values, tokens)]
        found[f"{kind}_idx"] = [_row(row, table.plain) for row in _listed(tokens, tokens)]
    return found


def clear(logprob: Any) -> None:
    """What has been packed does not go into prefill's own answer, which the router would add."""
    for kind in OF_PROMPT:
        for part in ("val", "idx"):
            if getattr(logprob, f"{kind}_{part}") is not None:
                setattr(logprob, f"{kind}_{part}", [])


def parts(packed: bytes) -> list[bytes]:
    return [packed[start : start + PART_BYTES] for start in range(0, len(packed), PART_BYTES)]


class Parts:
    """What arrived of one request's, in whatever order."""

    def __init__(self) -> None:
        self._parts: dict[int, bytes] = {}
        self._count = 0

    def add(self, index: int, count: int, data: bytes) -> None:
        """Raises ValueError for a part of another whole."""
        if not 0 <= index < count or (self._count and count != self._count):
            raise ValueError(f"part {index} of {count}, after parts of {self._count}")
        self._count = count
        self._parts[index] = data

    def whole(self) -> bytes | None:
        if not self._count or len(self._parts) != self._count:
            return None
        return b"".join(self._parts[index] for index in range(self._count))


def _table(values: Sequence[Any] | None, tokens: Sequence[Any] | None) -> Table | None:
    if not values or not tokens:
        return None
    values = [row.tolist() if hasattr(row, "tolist") else row for row in values]
    plain = not any(isinstance(row, list | tuple) for row in values)
    rows = [[row] if plain else row for row in values]
    ids = [[row] if plain else row for row in tokens]
    width = max((len(row) for row in rows if row), default=0)
    shape = len(rows), width
    numbers, names = np.zeros(shape, np.float32), np.full(shape, NONE, np.int32)
    for index, (row, name) in enumerate(zip(rows, ids, strict=True)):
        if row is None:
            continue
        if len(row) != len(name):
            raise ValueError(f"{len(row)} logprobs of {len(name)} tokens")
        numbers[index, : len(row)] = [np.nan if each is None else each for each in row]
        names[index, : len(row)] = name
    return Table(width, plain, numbers.tobytes(), names.tobytes())


def _numbers(
    table: Table, vocabulary: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    row = 4 * max(1, table.width)
    if len(table.values) % row or len(table.values) != len(table.tokens) or not table.width:
        raise ValueError(f"{len(table.values)} and {len(table.tokens)} bytes in rows of {row}")
    values = np.frombuffer(table.values, np.float32).reshape(-1, table.width)
    tokens = np.frombuffer(table.tokens, np.int32).reshape(-1, table.width)
    if tokens.min() < NONE or tokens.max() >= vocabulary:
        raise ValueError(f"token {tokens.max()} of a vocabulary of {vocabulary}")
    return values, tokens


def _listed(numbers: npt.NDArray[Any], tokens: npt.NDArray[np.int32]) -> list[list[Any]]:
    """Without the places that hold nothing; None for a number that is none."""
    rows = []
    for row, names in zip(numbers.tolist(), tokens.tolist(), strict=True):
        kept = [each for each, name in zip(row, names, strict=True) if name != NONE]
        rows.append([None if each != each else each for each in kept])
    return rows


def _row(row: list[Any], plain: bool) -> Any:
    if plain:
        return row[0] if row else None
    return row or None
