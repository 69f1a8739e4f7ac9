"""Which linear weights the reference runtime rounds, by --hma-weight-format."""

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch.nn import Parameter

from hma_kernels import reference
from sglang_hma.config import HmaConfig, WeightFormats, WeightGroup
from sglang_hma.prefill.reference import prepare_model
from sglang_hma.prefill.weights import refuse_quantized

GROUPS: dict[str, WeightGroup] = {
    "self_attn.qkv_proj.weight": "attention",
    "mlp.down_proj.weight": "mlp",
    "block.shared_expert.down_proj.weight": "mlp",
    "block.experts.w13_weight": "experts",
    "block.experts.w2_weight": "experts",
    "lm_head.weight": "head",
}
# As SGLang's families name them: Qwen3-MoE, Qwen2-MoE, XVERSE-MoE, DBRX.
KEPT = (
    "block.gate.weight",
    "block.shared_expert_gate.weight",
    "other.router.weight",
    "stacked.router.layer.weight",
)


def small_model() -> Any:
    """Linear layers, and experts [8, out, in], at the paths above."""
    model = torch.nn.Module()
    for path in (*GROUPS, *KEPT):
        *parents, name = path.split(".")
        stacked = name != "weight"
        if not stacked:
            name = parents.pop()
        place = model
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        if stacked:
            place.register_parameter(name, Parameter(torch.randn(8, 96, 64).bfloat16()))
        else:
            layer = ReplicatedLinear(64, 96, bias=False, params_dtype=torch.bfloat16)
            torch.nn.init.normal_(layer.weight)
            place.add_module(name, layer)
    return model


def packed(weight: torch.Tensor) -> torch.Tensor:
    """[..., out, in] through the numpy definition of the host packer."""
    if weight.dim() == 3:
        return torch.stack([packed(one) for one in weight])
    tiles = reference.pack(weight.float().T.numpy(), "host")
    return torch.from_numpy(reference.unpack(tiles)[: weight.shape[1], : weight.shape[0]]).T


@pytest.mark.parametrize(
    "formats",
    [
        WeightFormats(),
        WeightFormats.all("native"),
        WeightFormats(head="native"),
        WeightFormats(attention="native"),
        WeightFormats(attention="native", mlp="native"),
        WeightFormats(experts="native"),
        WeightFormats(mlp="native"),
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
        expected = before[path]
        if formats.packs(group):
            expected = packed(expected).bfloat16()
            assert not torch.equal(expected, before[path])
        assert torch.equal(model.state_dict()[path], expected), path
    for path in KEPT:
        assert torch.equal(model.state_dict()[path], before[path]), path


def with_experts(kind: str) -> torch.nn.Module:
    """As DBRX and DeepSeek have them: under other names, and as layers of their own."""
    model = torch.nn.Module()
    model.block = torch.nn.Module()
    if kind == "stacked":
        model.block.ws = Parameter(torch.randn(4, 32, 32))
    else:
        layers = [ReplicatedLinear(32, 32, bias=False) for _ in range(4)]
        model.block.experts = torch.nn.ModuleList(layers)
    return model


@pytest.mark.parametrize("kind", ["stacked", "listed"])
def test_experts_in_another_form_are_not_left_unrounded_in_silence(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for formats in (WeightFormats(experts="native"), WeightFormats()):
        config = HmaConfig(role="prefill", weight_formats=formats)
        for name, value in config.environment().items():
            monkeypatch.setitem(os.environ, name, value)
        model = with_experts(kind)
        model.lm_head = ReplicatedLinear(32, 64, bias=False)
        if formats.packs("experts"):
            with pytest.raises(RuntimeError, match=r"block.*--hma-weight-format experts=native"):
                prepare_model(model)
        else:
            prepare_model(model)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantized_experts_are_refused(dtype: torch.dtype) -> None:
    model = small_model()
    for name in ("w13_weight", "w2_weight"):
        weight = getattr(model.block.experts, name).detach().to(dtype)
        setattr(model.block.experts, name, Parameter(weight, requires_grad=False))
    with pytest.raises(RuntimeError, match=r"quantized.*--hma-weight-format native"):
        refuse_quantized(model)


class Scorer(torch.nn.Module):
    """What SGLang's logits processor is to a model: it is given the head."""

    def forward(self, hidden: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
        return hidden @ head.weight.T


class HeadIsTheEmbedding(torch.nn.Module):
    """As Gemma, Gemma 2 and Command R, or as Gemma 3, whose lm_head is not used
    (`named`) and whose embedding is torch's (`plain`)."""

    def __init__(self, *, plain: bool, named: bool) -> None:
        super().__init__()
        self.embed_tokens = (
            torch.nn.Embedding(64, 32) if plain else VocabParallelEmbedding(64, 32, enable_tp=False)
        )
        torch.nn.init.normal_(self.embed_tokens.weight)
        self.logits_processor = Scorer()
        if named:
            self.lm_head = self.embed_tokens

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.nn.functional.embedding(ids, self.embed_tokens.weight)
        return hidden, self.logits_processor(hidden, head=self.embed_tokens)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("formats", [WeightFormats(), WeightFormats(head="native")], ids=str)
def test_an_embedding_that_is_the_head_is_rounded_as_the_head_alone(
    monkeypatch: pytest.MonkeyPatch, formats: WeightFormats, named: bool, plain: bool
) -> None:
    config = HmaConfig(role="prefill", weight_formats=formats)
    for name, value in config.environment().items():
        monkeypatch.setitem(os.environ, name, value)
    model = HeadIsTheEmbedding(plain=plain, named=named)
    weight = model.embed_tokens.weight.detach().clone()
    prepare_model(model)
    hidden, scores = model(torch.arange(16))
    assert torch.equal(hidden, weight[:16])
    expected = packed(weight) if formats.packs("head") else weight
    assert torch.equal(scores, hidden @ expected.T)
    assert torch.equal(scores, hidden @ weight.T) != formats.packs("head")
