"""KVFormat: canonical text, and parsing of hostile text."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.kvcache.format import KVFormat, mismatch

formats = st.builds(
    KVFormat.bfp8,
    kv_heads=st.integers(1, 64),
    head_dim=st.integers(1, 16).map(lambda n: 32 * n),
    v_head_dim=st.integers(1, 16).map(lambda n: 32 * n),
    layers=st.integers(1, 128),
)


@given(formats)
def test_canonical_text_round_trips(fmt: KVFormat) -> None:
    assert KVFormat.parse(fmt.canonical()) == fmt
    assert KVFormat.parse(fmt.canonical()).digest() == fmt.digest()


@given(formats, formats)
def test_only_equal_formats_match(a: KVFormat, b: KVFormat) -> None:
    reason = mismatch(str(a), str(b), our_role="decode", their_role="prefill")
    assert (reason is None) == (a == b)
    if reason is not None:
        assert str(a) in reason and str(b) in reason
        for field in dataclasses.fields(a):
            if getattr(a, field.name) != getattr(b, field.name):
                assert f"{field.name}: " in reason


def test_stock_peer_is_named() -> None:
    ours = KVFormat.bfp8(kv_heads=8, head_dim=128, v_head_dim=128, layers=36)
    reason = mismatch(str(ours), None, our_role="prefill", their_role="decode")
    assert reason is not None and "stock SGLang" in reason and str(ours) in reason


@given(st.binary().map(lambda raw: raw.decode("latin-1")))
def test_peer_text_never_raises_in_mismatch(text: str) -> None:
    ours = KVFormat.bfp8(kv_heads=8, head_dim=128, v_head_dim=128, layers=36)
    assert mismatch(str(ours), text, our_role="prefill", their_role="decode")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hma-kv/1 name=bfp8_b",
        "hma-kv/2 name=bfp8_b",
        "hma-kv/2 " + " ".join(f"x{i}=1" for i in range(200)),
        str(KVFormat.bfp8(kv_heads=1, head_dim=32, v_head_dim=32, layers=1)) + " more=1",
        str(KVFormat.bfp8(kv_heads=1, head_dim=32, v_head_dim=32, layers=1)).replace(
            "kv_heads=1", "kv_heads=-1"
        ),
    ],
)
def test_malformed_descriptors_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="KV format"):
        KVFormat.parse(text)


@pytest.mark.parametrize("head_dim", [80, 72, 100])
def test_head_dims_off_the_tile_are_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        KVFormat.bfp8(kv_heads=8, head_dim=head_dim, v_head_dim=128, layers=1)
