"""A carried request comes out as it went in, whatever it says, with the router's rooms added."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_hma.entry.carrier import CARRIED, FIELD, MARK, MOST_ROOMS, Carried, pack, unpack
from sglang_hma.entry.rooms import rooms

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SPACE = st.sampled_from(["", " ", "\n\t "])


def routed(carrier: bytes) -> bytes:
    """What the router sends on: the fields that it knows, and its own."""
    asked = json.loads(carrier)
    assert set(asked) <= {FIELD, "stream", "text", "input_ids"}
    count = len(asked.get("input_ids", [0]))
    own: dict[str, Any] = {"bootstrap_host": "h", "bootstrap_port": 8998, "bootstrap_room": 7}
    if count > 1:
        own = {name: [value] * count for name, value in own.items()}
        own["bootstrap_room"] = list(range(count))
    return json.dumps(asked | {"model": None, "log_metrics": True} | own).encode()


@given(st.dictionaries(st.text(), VALUES, max_size=6), SPACE, SPACE, st.sampled_from(CARRIED))
def test_an_object_comes_out_with_rooms(
    asked: dict[str, Any], before: str, after: str, path: str
) -> None:
    body = before + json.dumps(asked) + after
    found = unpack(routed(pack(path, body.encode(), "text/plain")))
    assert found is not None and (found.path, found.content_type) == (path, "text/plain")
    own = json.loads(found.body)
    assert set(own) == {*asked, "bootstrap_host", "bootstrap_port", "bootstrap_room"}
    same = {name: own[name] for name in asked if not name.startswith("bootstrap_")}
    given = {name: asked[name] for name in same}
    assert json.dumps(same) == json.dumps(given)  # NaN is no equal of itself
    assert own["bootstrap_port"] in (8998, [8998] * rooms(path, asked))


@given(VALUES.filter(lambda value: not isinstance(value, dict)).map(json.dumps) | st.text())
def test_what_is_no_object_comes_out_as_it_is(body: str) -> None:
    try:
        if isinstance(json.loads(body), dict):
            return
    except ValueError:
        pass
    try:
        sent = body.encode()
    except UnicodeEncodeError:
        return
    assert unpack(routed(pack("/generate", sent, ""))) == Carried("/generate", sent, "")


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"text": "a", "session_params": {"id": "s"}}',
        b'{"text": "sglang_hma_request"}',
        json.dumps({FIELD: {MARK: "{}", "path": "/flush_cache"}}).encode(),
        json.dumps({FIELD: {MARK: 5, "path": "/generate"}}).encode(),
        json.dumps({FIELD: {MARK: "{}", "path": "/generate", "content_type": "a\nb"}}).encode(),
        json.dumps({FIELD: [MARK]}).encode(),
        b'{"session_params": {"sglang_hma_request": ',
        b"\xff",
    ],
)
def test_other_requests_are_no_carriers(body: bytes) -> None:
    assert unpack(body) is None


def test_refused_at_the_entry() -> None:
    with pytest.raises(ValueError, match="can't decode byte 0xff"):
        pack("/generate", b"\xff")
    with pytest.raises(ValueError, match=f"2048 answers at once, and {MOST_ROOMS} are the most"):
        pack("/v1/chat/completions", b'{"n": 2048}')


@pytest.mark.parametrize(
    "asked",
    [
        {"text": "a"},
        {"text": ["a"]},
        {"text": ["a", "b", "c"], "sampling_params": {"n": 2}},
        {"input_ids": [1, 2]},
        {"input_ids": [[1, 2], [3]], "sampling_params": [{"n": 3}, {"n": 3}]},
        {"input_ids": [[1]], "sampling_params": {"n": 4}},
        {"input_embeds": [[0.5, 1.0], [0.0, 2.0]]},
        {"input_embeds": [[[0.5, 1.0]], [[0.0, 2.0]]], "sampling_params": {"n": 2}},
        {"text": "a", "sampling_params": {"n": 3, "beam_width": 3}},
        {"text": "a", "sampling_params": {"n": 5}},
    ],
)
def test_rooms_are_sglangs_requests(asked: dict[str, Any]) -> None:
    request = GenerateReqInput(**asked)
    request.normalize_batch_and_arguments()
    assert rooms("/generate", asked) == request.batch_size * request.parallel_sample_num


@pytest.mark.parametrize(
    ("path", "asked", "count"),
    [
        ("/v1/completions", {"prompt": "a", "n": 3}, 3),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, 4),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, 2),
        ("/v1/completions", {"prompt": []}, 1),
        ("/v1/chat/completions", {"n": 4}, 4),
        ("/v1/chat/completions", {"n": "4"}, 1),
        ("/v1/chat/completions", {"n": True}, 1),
        ("/v1/chat/completions", {"n": -3}, 1),
        ("/v1/responses", {"n": 4}, 1),
        ("/generate", {"text": [], "sampling_params": [None]}, 1),
        ("/generate", {"input_ids": "abc", "sampling_params": 7}, 1),
    ],
)
def test_rooms_of_other_requests(path: str, asked: dict[str, Any], count: int) -> None:
    assert rooms(path, asked) == count
