"""Adapters that would be answered as others are refused; small tensors need no driver."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from sglang_hma import adapters
from sglang_hma.demo.random_model import make_random_model
from test.adapters import ALL, make_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_random_model(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ""),
        ({"r": 16, "lora_alpha": 3, "lora_dropout": 0.1, "init_lora_weights": "gaussian"}, ""),
        ({"use_rslora": True}, "use_rslora True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern {'q_proj': 4}"),
        ({"alpha_pattern": {"v_proj": 4}}, "alpha_pattern {'v_proj': 4}"),
        ({"modules_to_save": ["norm"]}, "modules_to_save ['norm']"),
        ({"bias": "lora_only"}, "bias lora_only"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
    ],
)
def test_what_sglang_leaves_out(
    model: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    """As peft writes it."""
    from sglang.srt.lora.lora_config import LoRAConfig

    config = LoRAConfig(str(make_adapter(model, tmp_path / "adapter", 0, **fields)))
    assert adapters.ignored(config.hf_config) == words


def test_what_was_not_tried() -> None:
    dense, sparse = torch.nn.Module(), torch.nn.Module()
    experts = torch.nn.Module()
    for name in ("w13_weight", "w2_weight"):
        experts.register_parameter(name, Parameter(torch.zeros(2, 4, 4)))
    sparse.add_module("experts", experts)

    def untried(model: torch.nn.Module, modules: Any) -> str:
        return adapters.untried(model, SimpleNamespace(target_modules=modules))

    assert untried(dense, list(ALL)) == ""
    assert untried(dense, ["q_proj", "lm_head", "embed_tokens"]) == "embed_tokens, lm_head"
    assert untried(dense, "all-linear") == "all-linear"
    assert untried(sparse, ["q_proj", "o_proj"]) == ""
    assert untried(sparse, list(ALL)) == "down_proj, gate_proj, up_proj"


def test_pinned_memory_is_plain_memory() -> None:
    with adapters.Unpinned():
        made = torch.tensor([1, 2, 3], pin_memory=True).pin_memory()
        empty = torch.empty((2,), dtype=torch.int32, pin_memory=True)
    assert made.tolist() == [1, 2, 3] and empty.dtype == torch.int32
    assert not made.is_pinned() and not empty.is_pinned()
