"""Which linear weights the reference runtime rounds, by --hma-weight-format."""

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear

from hma_kernels import reference
from sglang_hma.config import HmaConfig, WeightFormats
from sglang_hma.prefill.reference import prepare_model

GROUPS = {"self_attn.qkv_proj": "attention", "mlp.down_proj": "mlp", "lm_head": "head"}


ROUTER = "block.gate"


def small_model() -> Any:
    model = torch.nn.Module()
    for path in (*GROUPS, ROUTER):
        *parents, name = path.split(".")
        place = model
        for parent in parents:
            place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        layer = ReplicatedLinear(64, 96, bias=False, params_dtype=torch.bfloat16)
        torch.nn.init.normal_(layer.weight)
        place.add_module(name, layer)
    model.block.experts = torch.nn.Module()
    return model


@pytest.mark.parametrize(
    "formats",
    [
        WeightFormats(),
        WeightFormats.all("native"),
        WeightFormats(head="native"),
        WeightFormats(attention="native"),
        WeightFormats(attention="native", mlp="native"),
    ],
    ids=str,
)
def test_only_the_packed_groups_are_rounded(
    monkeypatch: pytest.MonkeyPatch, formats: WeightFormats
) -> None:
    torch.manual_seed(seed := int(np.random.SeedSequence().generate_state(1)[0]))
    print(f"seed {seed}")
    config = HmaConfig(role="prefill", weight_formats=formats)
    for name, value in config.environment().items():
        monkeypatch.setitem(os.environ, name, value)
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    prepare_model(model)
    for path, group in GROUPS.items():
        name = f"{path}.weight"
        expected = before[name]
        if formats.packs(group):
            tiles = reference.pack(expected.float().T.numpy(), "host")
            expected = torch.from_numpy(reference.unpack(tiles)).T.bfloat16()
            assert not torch.equal(expected, before[name])
        assert torch.equal(model.state_dict()[name], expected), path
    assert torch.equal(model.state_dict()[f"{ROUTER}.weight"], before[f"{ROUTER}.weight"])
