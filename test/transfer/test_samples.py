"""Several samples of a prompt are as many requests, each with its room, in SGLang's own order."""

from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_hma.transfer.request_values import normalize

THEIRS = GenerateReqInput.normalize_batch_and_arguments
FIELDS = (
    *("text", "input_ids", "sampling_params", "return_logprob", "logprob_start_len"),
    *("top_logprobs_num", "token_ids_logprob", "lora_path", "extra_key", "stream", "priority"),
)


def rows(asked: dict[str, Any]) -> list[dict[str, Any]]:
    request = GenerateReqInput(**asked)
    normalize(THEIRS, request)
    if request.is_single:
        each = [request]
    else:
        assert len(set(request.rid)) == request.batch_size
        each = [request[index] for index in range(request.batch_size)]
    return [
        {name: getattr(row, name) for name in FIELDS}
        | {"rooms": (row.bootstrap_host, row.bootstrap_port, row.bootstrap_room)}
        for row in each
    ]


@pytest.mark.parametrize(
    "asked",
    [
        {"text": "a", "sampling_params": {"temperature": 0.5}},
        {"text": ["a", "b"], "sampling_params": [{"top_k": 1}, {"top_k": 2}]},
        {"input_ids": [5, 6], "sampling_params": {}, "return_logprob": True, "stream": True},
        {
            "input_ids": [[1, 2], [3]],
            "sampling_params": {"max_new_tokens": 3},
            "lora_path": ["x", None],
            "top_logprobs_num": [1, 2],
            "token_ids_logprob": [[4], [5, 6]],
            "extra_key": ["k", "l"],
        },
        {"text": "a", "sampling_params": {}, "token_ids_logprob": [7, 8], "logprob_start_len": 0},
    ],
)
@pytest.mark.parametrize("count", [2, 3])
def test_each_sample_is_a_request(asked: dict[str, Any], count: int) -> None:
    alone = rows(asked)
    total = len(alone) * count
    given = asked["sampling_params"]
    several = [params | {"n": count} for params in (given if isinstance(given, list) else [given])]
    found = rows(
        asked
        | {"sampling_params": several if isinstance(given, list) else several[0]}
        | {"bootstrap_host": ["h"] * total, "bootstrap_port": [1] * total}
        | {"bootstrap_room": list(range(total))}
    )
    assert [row.pop("rooms") for row in found] == [("h", 1, room) for room in range(total)]
    for row in alone:
        del row["rooms"]
    expected = [row for row in alone for _ in range(count)]
    for row, plain in zip(found, expected, strict=True):
        row["sampling_params"].pop("n")
        assert row == plain
    params = [row["sampling_params"] for row in found]
    assert len({id(each) for each in params}) == total


def test_prompts_with_different_numbers_of_samples() -> None:
    with pytest.raises(ValueError, match="n is not 2 for all prompts"):
        rows({"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 3}], "bootstrap_room": 7})


@pytest.mark.parametrize(
    "asked",
    [
        {"sampling_params": [{"beam_width": 2}]},
        {"sampling_params": {}, "return_hidden_states": True},
    ],
)
def test_what_a_pair_would_serve_a_part_of(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"beam_width is 2|return_hidden_states is given"):
        rows({"text": ["a"], "bootstrap_room": 7} | asked)


def test_rooms_of_samples() -> None:
    """One room is the first of as many; too few would keep a sample waiting for ever."""
    asked = {"text": "a", "sampling_params": {"n": 3}, "bootstrap_host": "h", "bootstrap_port": 1}
    found = rows(asked | {"bootstrap_room": 7})
    assert [row["rooms"] for row in found] == [("h", 1, 7), ("h", 1, 8), ("h", 1, 9)]
    with pytest.raises(ValueError, match="bootstrap_room has 2 entries, and this asks for 3"):
        rows(asked | {"bootstrap_room": [7, 8]})
