"""Rooflines against what others have measured, and against their own limits."""

import pytest

from sglang_hma.planner import catalogue, roofline
from sglang_hma.planner.catalogue import CatalogueError
from sglang_hma.planner.model_shape import KNOWN
from sglang_hma.planner.roofline import DoesNotFit, nvidia, tenstorrent

CATALOGUE = catalogue.load()

# AIConfigurator 0.12's operator times on silicon, Qwen3-8B, SGLang, one GPU, ms.
PREFILL = {
    "a100-sxm-80": {512: 38.9, 2048: 135.8, 8192: 594.9},
    "h100-sxm": {512: 13.5, 2048: 46.3, 8192: 211.0},
    "l40s": {512: 44.0, 2048: 159.0, 8192: 757.0},
    "rtx-pro-6000": {512: 27.8, 2048: 91.8, 8192: 385.5},
}
DECODE_AT_4096 = {
    "a100-sxm-80": {1: 12.6, 32: 30.6, 64: 43.1, 128: 76.5},
    "h100-sxm": {1: 6.9, 32: 13.1, 64: 19.5, 128: 31.8},
}


@pytest.mark.parametrize("card", PREFILL)
def test_prefill_is_near_what_was_measured(card: str) -> None:
    model = nvidia(CATALOGUE, card, KNOWN["Qwen3-8B"])
    for tokens, ms in PREFILL[card].items():
        assert model.prefill_s((tokens, 0)) * 1e3 == pytest.approx(ms, rel=0.35), tokens


@pytest.mark.parametrize("card", DECODE_AT_4096)
def test_decode_is_near_what_was_measured(card: str) -> None:
    model = nvidia(CATALOGUE, card, KNOWN["Qwen3-8B"])
    for batch, ms in DECODE_AT_4096[card].items():
        assert model.decode_s(batch, 4096 * batch) * 1e3 == pytest.approx(ms, rel=0.35), batch


def test_public_points_of_tenstorrent_come_out() -> None:
    """Those that the named efficiencies were inferred from."""
    for name, cards, shape, tokens, efficiency, ms in (
        ("p150", 1, "Llama-3.1-8B", 712, "tenstorrent-one-chip", 75.0),
        ("p150", 4, "Llama-3.1-8B", 2047, "tenstorrent-four-chips", 144.9),
        ("n300", 1, "Qwen3-8B", 2048, "tenstorrent-n300", 423.0),
        ("p150", 4, "Qwen3-32B", 128, "tenstorrent-small", 128 / 1618 * 1e3),
    ):
        model = tenstorrent(CATALOGUE, name, KNOWN[shape], cards, efficiency=efficiency)
        assert model.prefill_s((tokens, 0)) * 1e3 == pytest.approx(ms, rel=0.12), (name, shape)


def test_bfp8_pages_hold_more_and_are_read_faster() -> None:
    shape = KNOWN["Qwen3-8B"]
    plain = nvidia(CATALOGUE, "a100-sxm-80", shape)
    ours = nvidia(CATALOGUE, "a100-sxm-80", shape, kv="bfp8")
    assert ours.kv_tokens == pytest.approx(plain.kv_tokens * 32 / 17, rel=1e-4)
    many = 64 * 8192
    weights = plain.decode_s(64, 0)
    speed = CATALOGUE.efficiencies["bfp8-decode-attention"].value
    assert ours.decode_s(64, many) - weights == pytest.approx(
        (plain.decode_s(64, many) - weights) / speed
    )


def test_memory_that_holds_no_kv_is_said() -> None:
    with pytest.raises(DoesNotFit, match=r"Llama-3\.1-70B: 141 GB of weights .* 1 x NVIDIA A100"):
        nvidia(CATALOGUE, "a100-sxm-80", KNOWN["Llama-3.1-70B"])
    assert nvidia(CATALOGUE, "a100-sxm-80", KNOWN["Llama-3.1-70B"], 4).kv_tokens > 100_000


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(CatalogueError, match=r"has no rate for bf16 products; it has bfp8"):
        nvidia(CATALOGUE, "p150", KNOWN["Qwen3-4B"])
    with pytest.raises(CatalogueError, match=r"'fast' is not in the catalogue.*tenstorrent-small"):
        tenstorrent(CATALOGUE, "p150", KNOWN["Qwen3-4B"], efficiency="fast")


def test_answers_say_what_they_rest_on() -> None:
    model = nvidia(CATALOGUE, "h100-sxm", KNOWN["Qwen3-8B"], kv="bfp8")
    assert {figure.kind for figure in model.used} == {"quoted", "inferred", "measured"}
    assert roofline.RESERVED < 1
