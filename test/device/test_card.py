"""The runtime's arithmetic on a card, or on the vendor's simulator (TT_METAL_SIMULATOR)."""

import os
import secrets
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from hma_kernels import bfp8_pack
from sglang_hma.config import WeightFormats
from sglang_hma.prefill.ttnn.buckets import inputs, pack
from sglang_hma.prefill.ttnn.card import Card, opened, visible_cards
from sglang_hma.prefill.ttnn.chunk import pages_of
from sglang_hma.prefill.ttnn.lane import input_bytes
from sglang_hma.prefill.ttnn.offline import split
from sglang_hma.prefill.ttnn.shape import BF16

from ..prefill.models import (
    CASES,
    Case,
    check_agreement,
    check_traces,
    drawn,
    on_card,
    random_model,
)

needs_a_card = pytest.mark.skipif(
    find_spec("ttnn") is None or not (visible_cards() or os.environ.get("TT_METAL_SIMULATOR")),
    reason="no Tenstorrent card, and TT_METAL_SIMULATOR names no simulator",
)


pytestmark = [needs_a_card, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def card() -> Iterator[Card]:
    with opened() as device:
        yield device


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


GRID = [
    *(
        Case("qwen3", layers, head_dim, length, cuts, spread)
        for spread in (False, True)
        for layers in (2, 4)
        for head_dim in (64, 128)
        for length, cuts in (
            *((n, ()) for n in (1, 31, 32, 33, 64, 100)),
            (64, (32,)),
            (100, (64,)),
            (100, (32, 64)),
        )
    ),
    Case("qwen3", 1, 128, 33, spread=False, hidden=5120),
    *(case for case in CASES if case.kind != "qwen3"),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_agrees_with_transformers(card: Card, rng: np.random.Generator, case: Case) -> None:
    check_agreement(card, rng, case)


@pytest.mark.parametrize("width", [256, 5120, 8192])
def test_norm_is_near_bf16_at_every_width(card: Card, rng: np.random.Generator, width: int) -> None:
    """BF16 alone is 0.0016 of a value off; ttnn's norm, as it comes, is 0.036 off at 5,120."""
    import ttnn

    hf = random_model("llama", layers=1, hidden=width)
    x = torch.randn(32, width).bfloat16()
    on = ttnn.from_torch(
        x[None, None], dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=card.device
    )
    got = on_card(card, hf).model.output.hidden(on).double()
    wide = x.double()
    scale = (wide.square().mean(-1, keepdim=True) + hf.config.rms_norm_eps).rsqrt()
    expected = wide * scale * hf.model.norm.weight.detach().double()
    off = float((got - expected).norm() / expected.norm())
    print(f"norm of {width} values: {off:.5f} off")
    assert off < 0.0025


@pytest.mark.parametrize(("length", "cuts"), [(33, []), (100, [64])])
def test_pages_hold_what_the_device_rule_packs(
    card: Card,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    cuts: list[int],
) -> None:
    """Every byte that arrives on the host, of every layer, from the BF16 K and V on the card."""
    import ttnn

    unpacked: list[torch.Tensor] = []
    typecast = ttnn.typecast

    def recorded(x: Any, dtype: Any, **options: Any) -> Any:
        unpacked.append(ttnn.to_torch(x)[0])
        return typecast(x, dtype, **options)

    monkeypatch.setattr(ttnn, "typecast", recorded)
    runtime = on_card(card, random_model("qwen3", head_dim=128))
    tokens = rng.integers(0, 512, length)
    pages = rng.permutation(np.arange(1, 20))[: pages_of(length)]
    for chunk in split(tokens, cuts, pages):
        runtime.prefill([chunk])
        runner = runtime.runner
        (group,) = pack([chunk], runner.buckets)
        given = inputs(group, [chunk], runner.width, runtime.model.context)
        tiles = np.flatnonzero(given.own_pages)
        used = torch.from_numpy(given.own_pages[tiles]).long()
        for layer in range(runtime.shape.layers):
            for which in range(2):
                packed = bfp8_pack(unpacked.pop(0).contiguous(), rounding="device")
                expected = packed.transpose(0, 1)[tiles]
                assert torch.equal(runtime.host[layer][which][used], expected)
    assert not unpacked


def test_memory_is_as_predicted_and_nothing_compiles_after_the_start(
    card: Card, rng: np.random.Generator
) -> None:
    before = card.dram.free
    runtime = on_card(card, random_model("qwen3"), pages=200, chunk_tokens=256)
    taken = before - card.dram.free
    shape, runner = runtime.shape, runtime.runner
    predicted = shape.weight_bytes(WeightFormats()) + 200 * shape.page_bytes * shape.layers
    predicted += 2 * runtime.model.context * shape.head_dim * BF16
    predicted += sum(input_bytes(bucket, runner.width) for bucket in runner.buckets)
    print(f"DRAM: {taken} bytes taken, {predicted} predicted")
    assert abs(predicted - taken) <= 0.05 * taken
    runner.warm_up(traces=False)
    assert card.programs > 0
    for _ in range(4):
        runtime.prefill(drawn(rng, 64), last=True)
    assert runner.facts()["programs_after_start"] == 0


def test_traces_compute_what_calls_do(card: Card, rng: np.random.Generator) -> None:
    check_traces(card, rng, "qwen3", layers=2, chunk=128)
