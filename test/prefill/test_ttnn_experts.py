"""Which experts a token gets, and with which weights, on the stand-in for ttnn."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_hma.config import WeightFormats
from sglang_hma.prefill.ttnn import experts
from sglang_hma.prefill.ttnn.card import Card, opened
from sglang_hma.prefill.ttnn.experts import Experts
from sglang_hma.prefill.ttnn.model import PrefillModel, rotary_embedding
from sglang_hma.prefill.ttnn.shape import ModelShape
from sglang_hma.prefill.ttnn.weights import Weights

from .models import random_model, saved

pytestmark = pytest.mark.usefixtures("stand_in")
NATIVE = WeightFormats.all("native")


def on_card(card: Card, hf: Any) -> PrefillModel:
    shape = ModelShape.of(hf.config)
    weights = Weights(shape, card, None, NATIVE)
    weights.load(saved(hf).items())
    return PrefillModel(card, shape, weights, rotary_embedding(hf.config), context=64)


def read(card: Card, tensor: Any) -> torch.Tensor:
    card.wait()
    return tensor.on_chip(0).value[0, 0]


def upload(model: PrefillModel, x: torch.Tensor) -> Any:
    import ttnn

    return model.card.tensor(x[None, None], ttnn.bfloat16, ttnn.TILE_LAYOUT)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("equal", [False, True])
def test_the_router_is_that_of_transformers(
    rng: np.random.Generator, normed: bool, equal: bool
) -> None:
    """From the same BF16 input, in float32. Experts with equal weights tie in every token: the one
    with the lower number is taken, and never more than there are to take."""
    hf = random_model("qwen3_moe", layers=1)
    hf.config.norm_topk_prob = normed
    gate = hf.model.layers[0].mlp.gate
    gate.norm_topk_prob = normed
    if equal:
        gate.weight.data[1::2] = gate.weight.data[::2]
    x = torch.from_numpy(rng.standard_normal((96, 256), np.float32)).bfloat16()
    with opened() as card:
        model = on_card(card, hf)
        assert model.shape.experts is not None
        routed = read(card, model.mlp._route(model.shape.experts, 0, upload(model, x)))
    _, scores, chosen = gate(x.float())
    expected = torch.zeros(96, 32).scatter(1, chosen, scores)
    assert ((routed > 0).sum(1) == 4).all()
    if equal:
        pairs = routed.unflatten(1, (16, 2))
        assert torch.equal(pairs[..., 0] > 0, pairs[..., 1] > 0)
        expected = expected.unflatten(1, (16, 2)).sum(-1)
        routed = pairs.sum(-1)
    assert torch.equal(routed > 0, expected > 0)
    assert torch.allclose(routed, expected, rtol=2**-8)


def test_of_three_equal_experts_the_first_two_are_taken() -> None:
    hf = random_model("qwen3_moe", layers=1)
    hf.config.num_experts_per_tok = 2
    gate = hf.model.layers[0].mlp.gate
    gate.weight.data.zero_()
    gate.weight.data[[5, 17, 30]] = 1
    with opened() as card:
        model = on_card(card, hf)
        assert model.shape.experts is not None
        ones = upload(model, torch.ones(32, 256).bfloat16())
        routed = read(card, model.mlp._route(model.shape.experts, 0, ones))
    assert (routed[:, [5, 17]] == 0.5).all() and (routed > 0).sum() == 64


@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("widest", [64, 128, 2048])
def test_groups_of_experts_are_the_experts(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, chips: int, widest: int
) -> None:
    """One by one, two at a time and all together."""
    monkeypatch.setattr(experts, "WIDEST", widest)
    hf = random_model("qwen3_moe", layers=1)
    x = torch.from_numpy(rng.standard_normal((64, 256), np.float32)).bfloat16()
    with opened(range(chips), chips) as card:
        model = on_card(card, hf)
        assert model.shape.experts is not None
        assert model.shape.experts.together == widest // 64
        got = read(card, model.mlp(0, upload(model, x)))
    with torch.no_grad():
        expected = hf.model.layers[0].mlp(x.float()[None])[0]
    assert (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ({"mlp_only_layers": [0, 1, 2, 3, 4, 5]}, None),
    ],
)
def test_layers_with_experts(fields: dict[str, Any], layers: list[int] | None) -> None:
    """Those where transformers has them."""
    defaults = {"decoder_sparse_step": 1, "mlp_only_layers": None, "num_hidden_layers": 6}
    sizes = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    found = Experts.of(SimpleNamespace(**defaults | sizes | fields, norm_topk_prob=True))
    assert (None if found is None else sorted(found.layers)) == layers
    if found is not None:
        assert (found.together, found.groups, found.columns) == (16, 8, 12288)
        assert found.split(4).columns == 3072
