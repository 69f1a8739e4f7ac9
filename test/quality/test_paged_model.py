"""Documents scored through the product's pages, against transformers."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmark.models.truth import Conversation, Truth
from benchmark.quality.outliers import add_outliers
from benchmark.quality.paged_model import Models, PagedModel, emulate_bf16, reply_of
from benchmark.quality.policies import BF16, FLOAT32, OURS_FLOAT32, Policy
from hma_kernels import PAGE
from sglang_hma.demo.random_model import make_random_model

TOKENS, CONTEXT = 150, 96
SIZES = dict(layers=2, heads=4, kv_heads=2, head_dim=64, hidden=256, vocab=600)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    tied = request.param == "llama"
    return make_random_model(folder, family=request.param, tie_embeddings=tied, **SIZES)


@pytest.fixture(scope="module")
def model(path: Path) -> PagedModel:
    return PagedModel(Models(path), TOKENS)


@pytest.fixture
def ids(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 590) for _ in range(TOKENS)]


def test_float32_is_transformers(path: Path, model: PagedModel, ids: list[int]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.inference_mode():
        expected = plain(torch.tensor([ids])).logits[0, CONTEXT - 1 : -1]
    assert (model.logits(ids, CONTEXT, FLOAT32) - expected).abs().max() < 1e-3


def test_ours_is_the_oracle(path: Path, model: PagedModel, ids: list[int]) -> None:
    """Weights and KV rounded by the numpy definition, all else in float64."""
    logits = model.logits(ids, CONTEXT, OURS_FLOAT32)
    regrets = logits.max(-1).values - logits[range(len(logits)), ids[CONTEXT:]]
    expected = torch.tensor(Truth.of(path).regrets(ids[:CONTEXT], ids[CONTEXT:]))
    plain = torch.tensor(Truth.of(path).regrets(ids[:CONTEXT], ids[CONTEXT:], rounded=False))
    # A last-bit difference may flip a rounding of K, which every later token then reads.
    assert (regrets - expected).abs().median() < (regrets - plain).abs().median() / 4
    assert (regrets - expected).abs().max() < 0.3


def test_a_kept_reply_is_the_conversation(path: Path, model: PagedModel, ids: list[int]) -> None:
    """Two turns: what decode said in the first is in its cache as it computed it."""
    policy = replace(OURS_FLOAT32, own_reply=True)
    logprobs = torch.log_softmax(model.logits(ids, CONTEXT, policy), -1)
    reply = reply_of(CONTEXT)
    assert len(reply) == PAGE
    conversation = Conversation(Truth.of(path))
    # The last token that a turn says has no K and V yet, so one more is said, and not kept.
    conversation.logprobs(ids[: reply.start], ids[reply.start : reply.stop + 1], 0)
    expected = conversation.logprobs(ids[:CONTEXT], ids[CONTEXT:], reply.stop)
    again = Truth.of(path).bfp8(ids[:CONTEXT], ids[CONTEXT:])[CONTEXT - 1 :]
    apart, without = (logprobs - expected).abs(), (logprobs - again).abs()
    assert apart[1:].median() < without[1:].median() / 4
    assert apart.max() < 0.3


def test_bf16_rounds_more_than_float32(model: PagedModel, ids: list[int]) -> None:
    exact = model.logits(ids, CONTEXT, FLOAT32)
    pages = model.logits(ids, CONTEXT, Policy("KV BF16", dtype=torch.float32))
    all_bf16 = model.logits(ids, CONTEXT, BF16)
    assert 0 < (pages - exact).abs().mean() < (all_bf16 - exact).abs().mean() < 0.2


def test_noise_flips_some_roundings(model: PagedModel, ids: list[int]) -> None:
    plain = model.logits(ids, CONTEXT, Policy("KV BF16", dtype=torch.float32))
    ours = model.logits(ids, CONTEXT, OURS_FLOAT32)
    noisy = model.logits(ids, CONTEXT, replace(OURS_FLOAT32, noise=1e-3))  # a rounding is 1e-2
    assert 0 < (noisy - ours).abs().mean() < (ours - plain).abs().mean()


def test_outliers_leave_the_function(path: Path, model: PagedModel, ids: list[int]) -> None:
    before = model.logits(ids, CONTEXT, FLOAT32)
    models = Models(path)
    stressed = models.get(torch.float32, attention="sdpa")
    add_outliers(stressed, 32.0)  # a power of two: exact in bfloat16 too
    after = PagedModel(models, TOKENS).logits(ids, CONTEXT, FLOAT32)
    assert (after - before).abs().max() < 1e-3
    attention = stressed.model.layers[0].self_attn
    scaled = getattr(attention, "k_norm", attention.k_proj).weight.flatten().abs()
    assert scaled.max() > 8 * scaled.median()


def test_bf16_by_float32_is_bf16(path: Path, ids: list[int]) -> None:
    """Layer by layer on the same input: what differs is a last bit, now and then."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    seen: list[tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, x, y: seen.append((m, x[0], y)))
    with torch.inference_mode():
        model(torch.tensor([ids]))
        native, seen = seen, []
        emulate_bf16(model)
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        for module, x, expected in native:
            found = module.forward(x)
            assert found.dtype == torch.bfloat16
            apart = (found.float() - expected.float()).abs()
            assert (apart <= expected.float().abs() * 2**-7 + 1e-3).all()
            assert (apart > 0).float().mean() < 0.02
