"""The tool that rounds a transformers model's weights by group, against the families' own truth."""

import copy
from pathlib import Path

import pytest
import torch

from benchmark.models.checkpoint import make_checkpoint
from benchmark.models.families import FAMILIES
from benchmark.models.truth import Truth
from sglang_hma.prefill.compare import pack_weights

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("name", ["Qwen2-MoE", "Phi-3.5-MoE", "Granite MoE", "ERNIE 4.5 MoE"])
def test_routers_and_gates_of_shared_experts_stay(name: str, tmp_path: Path, seed: int) -> None:
    family = BY_NAME[name]
    model = make_checkpoint(family, tmp_path, seed).float()
    expected = Truth(copy.deepcopy(model).double(), family.experts).rounded
    packed, dense = (copy.deepcopy(model) for _ in range(2))
    pack_weights(packed)
    pack_weights(dense, ("attention", "mlp", "head"))
    found, before = packed.state_dict(), model.state_dict()
    without_experts = dense.state_dict()
    changed = set()
    for path, weight in expected.state_dict().items():
        assert torch.equal(found[path].double(), weight), path
        if not torch.equal(found[path], before[path]):
            changed.add(path)
        stacked = weight.dim() == 3
        assert torch.equal(without_experts[path], before[path] if stacked else found[path]), path
    assert changed and not any("shared_expert_gate" in path for path in changed)
    assert any("experts.down_proj" in path for path in changed)
    assert not any(path.endswith(("gate.weight", "router.weight")) for path in changed)
