"""The runtime's arithmetic on a card, or on the vendor's simulator (TT_METAL_SIMULATOR)."""

import os
import secrets
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from sglang_hma.prefill.ttnn.card import Card, opened, visible_cards

from ..prefill.models import CASES, check_agreement

pytestmark = pytest.mark.skipif(
    find_spec("ttnn") is None or not (visible_cards() or os.environ.get("TT_METAL_SIMULATOR")),
    reason="no Tenstorrent card, and TT_METAL_SIMULATOR names no simulator",
)


@pytest.fixture(scope="module")
def card() -> Iterator[Card]:
    with opened() as device:
        yield device


@pytest.mark.parametrize(("kind", "layers", "head_dim", "length", "cuts"), CASES)
def test_agrees_with_transformers(
    card: Card, kind: str, layers: int, head_dim: int, length: int, cuts: list[int]
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    check_agreement(card, np.random.default_rng(seed), kind, layers, head_dim, length, cuts)
