"""Logprobs of a prompt arrive as they left; nonsense from a peer raises ValueError only."""

import contextlib
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer import prompt_logprobs
from sglang_hma.transfer.messages import PromptLogprobs, frames, parse
from sglang_hma.transfer.prompt_logprobs import KINDS, Parts, pack, parts, unpack

VOCABULARY = 1000
PARTS = ("val", "idx")


class Logprobs:
    """What is asked of SGLang's ReqLogprob."""

    def __init__(self, **fields: Any) -> None:
        for kind in KINDS:
            for part in PARTS:
                setattr(self, f"{kind}_{part}", fields.get(f"{kind}_{part}"))


def made(rng: random.Random, rows: int, top: int, ids: int) -> Logprobs:
    """As SGLang has them: the first position of a prompt has no logprob."""

    def number() -> float:
        return float(np.float32(rng.gauss(-3, 2)))

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    fields: dict[str, Any] = {
        "input_token_logprobs_val": [None, *(number() for _ in range(rows - 1))],
        "input_token_logprobs_idx": tokens(rows),
    }
    for kind, width in (("input_top_logprobs", top), ("input_token_ids_logprobs", ids)):
        if width:
            drawn = [[number() for _ in range(width)] for _ in range(rows - 1)]
            fields[f"{kind}_val"] = [None, *drawn]
            fields[f"{kind}_idx"] = [None, *(tokens(width) for _ in range(rows - 1))]
            first = kind.replace("input", "output")
            fields[f"{first}_val"] = [[number() for _ in range(width)]]
            fields[f"{first}_idx"] = [tokens(width)]
    return Logprobs(**fields)


def test_they_arrive_as_they_left(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(prompt_logprobs, "PART_BYTES", 100)
    for _ in range(50):
        left = made(rng, rng.randrange(2, 60), rng.choice([0, 1, 5]), rng.choice([0, 3]))
        cut = parts(pack(left))
        arrived = Parts()
        for index in rng.sample(range(len(cut)), len(cut)):
            assert arrived.whole() is None
            message = PromptLogprobs(5, index, len(cut), cut[index])
            assert parse(frames(message)) == message
            arrived.add(index, len(cut), cut[index])
        whole = arrived.whole()
        assert whole is not None
        found = unpack(whole, VOCABULARY)
        for kind in KINDS:
            for part in PARTS:
                assert found.get(f"{kind}_{part}") == getattr(left, f"{kind}_{part}")


def test_what_prefill_answers_itself_is_empty(seed: int) -> None:
    left = made(random.Random(seed), 9, 2, 0)
    prompt_logprobs.clear(left)
    assert left.input_token_logprobs_val == left.input_top_logprobs_idx == []
    assert left.input_token_ids_logprobs_val is None
    assert set(unpack(pack(left), VOCABULARY)) == {f"output_top_logprobs_{p}" for p in PARTS}


def test_a_token_that_is_none_of_the_vocabulary(seed: int) -> None:
    left = made(random.Random(seed), 9, 0, 0)
    left.input_token_logprobs_idx[3] = VOCABULARY
    with pytest.raises(ValueError, match="token 1000 of a vocabulary of 1000"):
        unpack(pack(left), VOCABULARY)


@given(st.binary(max_size=200))
def test_nonsense(packed: bytes) -> None:
    with contextlib.suppress(ValueError):
        unpack(packed, VOCABULARY)


@given(st.integers(0, 9), st.booleans(), st.binary(max_size=64), st.binary(max_size=64))
def test_tables_of_nonsense(width: int, plain: bool, values: bytes, tokens: bytes) -> None:
    table = [width, plain, values, tokens]
    try:
        found = unpack(msgspec.msgpack.encode([[table, None, None, None, None]]), VOCABULARY)
    except ValueError:
        return
    assert len(found["input_token_logprobs_val"]) == len(values) // 4 // width


def test_parts_of_different_wholes() -> None:
    arrived = Parts()
    arrived.add(0, 2, b"a")
    for index, count in ((1, 3), (2, 2)):
        with pytest.raises(ValueError, match=f"part {index} of {count}"):
            arrived.add(index, count, b"b")
