"""Answers of bootstrap servers: what does not suit is refused in one line, whatever it is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer.decode import routes

GOOD = {
    **{"attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 32},
    **{"kv_cache_dtype": "auto", "follow_bootstrap_room": True, "kv_layout": "hma-kv/1"},
    **{"enable_dsa_cache_layer_split": False, "enable_kv_cache_sharding": False},
    **{"prefill_http_port": 30001, "decode_allocation_policy": "early", "target_tp_rank": None},
}


def refusal(answer: dict[str, Any], packs_kv: bool = True) -> str | None:
    try:
        route = routes.parse(answer)
    except ValueError as error:
        return str(error)
    return routes.unsuitable(
        route, page_size=32, kv_cache_dtype="auto", pp_size=1, packs_kv=packs_kv
    )


def test_an_answer_of_our_own_prefill_server_suits() -> None:
    assert refusal(GOOD) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_size": 16}, "page size mismatch: the prefill server has 16, the decode server 32"),
        ({"page_size": None}, "page size mismatch"),
        ({"page_size": "32"}, "`str`"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "KV cache dtype mismatch"),
        ({"kv_cache_dtype": None}, "KV cache dtype mismatch"),
        ({"attn_cp_size": 2}, "context-parallel (2)"),
        ({"attn_cp_size": 0}, ">= 1"),
        ({"pp_size": 2}, "pipeline-parallel (2)"),
        ({"pp_size": -1}, ">= 1"),
        ({"attn_tp_size": 0}, ">= 1"),
        ({"attn_tp_size": 1 << 40}, "<= 1024"),
        ({"attn_tp_size": "two"}, "`str`"),
        ({"dp_size": None}, "`null`"),
        ({"enable_kv_cache_sharding": True}, "splits its pages"),
        ({"kv_layout": "x" * 5000}, "length <= 1024"),
        ({"target_tp_ranks": [0, 1]}, "target_tp_ranks"),
        ({"more": 1}, "more"),
    ],
)
def test_what_does_not_suit_is_refused(change: dict[str, Any], words: str) -> None:
    reason = refusal(GOOD | change)
    assert reason is not None and words in reason and "\n" not in reason, reason


def test_native_pages_may_be_split_between_stages() -> None:
    assert refusal(GOOD | {"pp_size": 2, "attn_cp_size": 2}, packs_kv=False) is None


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*GOOD, "more"]), ANYTHING))
def test_nonsense_raises_nothing_else(change: dict[str, Any]) -> None:
    refusal(GOOD | change)


@given(st.dictionaries(st.sampled_from(["rank_ip", "rank_port", "pp_rank", "more"]), ANYTHING))
def test_nonsense_is_no_rank(info: dict[str, Any]) -> None:
    try:
        found = routes.parse_rank(info)
    except ValueError:
        return
    assert 0 < found.rank_port < 1 << 16 and found.rank_ip


@pytest.mark.parametrize("host", ["", "a b", "tcp://x", "10.0.0.1;eth0", "a\n", "x" * 300, None])
def test_odd_hosts_are_no_ranks(host: Any) -> None:
    with pytest.raises(ValueError, match="no address of a rank"):
        routes.parse_rank({"rank_ip": host, "rank_port": 1})
