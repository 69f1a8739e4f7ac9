"""Attention that the backend would compute as something else is refused by name."""

from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_hma.attention.backend import HmaAttnBackend, require_plain


def layer(**changes: Any) -> RadixAttention:
    built = RadixAttention(
        4, 64, scaling=0.125, num_kv_heads=2, layer_id=7, logit_cap=changes.pop("logit_cap", 0.0)
    )
    for name, value in changes.items():
        assert hasattr(built, name)
        setattr(built, name, value)
    return built


@pytest.mark.parametrize("method", ["forward_extend", "forward_decode"])
@pytest.mark.parametrize("name", ["rel_bias", "score_mod", "something_new"])
def test_unknown_arguments(method: str, name: str) -> None:
    rows = torch.zeros(1, 64)
    forward = getattr(HmaAttnBackend.__new__(HmaAttnBackend), method)
    with pytest.raises(NotImplementedError) as refused:
        forward(rows, rows, rows, layer(), None, **{name: torch.zeros(4)})
    message = str(refused.value)
    assert f"layer 7 asks attention for {name}" in message
    assert "--hma-kv-format native" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"xai_temperature_len": 1024},
        {"use_irope": True},
        {"pos_encoding_mode": "ALIBI"},
        {"logit_cap": 30.0, "logit_capping_method": "sigmoid"},
    ],
)
def test_layers_that_are_not_plain(changes: dict[str, Any]) -> None:
    asked = layer(**changes)
    with pytest.raises(NotImplementedError, match=list(changes)[-1]):
        require_plain(asked, {})


def test_plain_layers_pass() -> None:
    require_plain(layer(), {})
    require_plain(layer(), {"score_mod": None})  # as models do that have it in some layers
    require_plain(layer(logit_cap=30.0), {})
