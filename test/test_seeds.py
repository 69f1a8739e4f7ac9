"""A request with a seed says the same in whatever company, and the others go on as before."""

import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import sampler
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_hma import cpu_ops, seeds

VOCABULARY = 50
THEIRS = {
    "from": SamplingBatchInfo.adjusted_from_schedule_batch,
    "merge": SamplingBatchInfo.merge_batch,
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = itertools.count(1 << 40)
    monkeypatch.setattr(seeds, "unchosen", lambda: next(counted))
    monkeypatch.setattr(sampler, "murmur_hash32", partial(cpu_ops.murmur_hash32, None))


def batch(*given: int | None) -> SamplingBatchInfo:
    size = len(given)
    made = SamplingBatchInfo(
        temperatures=torch.ones(size, 1),
        top_ps=torch.full((size,), 0.9),
        top_ks=torch.full((size,), 20, dtype=torch.int32),
        min_ps=torch.zeros(size),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=False,
        vocab_size=VOCABULARY,
        penalizer_orchestrator=SimpleNamespace(merge=lambda _: None, filter=lambda _: None),
        device="cpu",
    )
    reqs = [SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed)) for seed in given]
    seeds.from_batch(THEIRS["from"], made, SimpleNamespace(reqs=reqs), VOCABULARY)
    return made


def merged(one: SamplingBatchInfo, another: SamplingBatchInfo) -> SamplingBatchInfo:
    seeds.merge_batch(THEIRS["merge"], one, another)
    return one


def drawn(info: SamplingBatchInfo, probs: torch.Tensor, position: int) -> list[int]:
    filters = info.need_top_p_sampling or info.need_top_k_sampling or info.need_min_p_sampling
    positions = torch.full((len(probs),), position)
    tokens, _ = seeds.sample(None, None, probs.clone(), info, positions, not filters)
    assert tokens.dtype == torch.int32
    return list(tokens.tolist())


def plain(*given: int | None) -> SamplingBatchInfo:
    """Without top_k and top_p."""
    made = batch(*given)
    made.top_ps.fill_(1.0)
    made.top_ks.fill_(1 << 30)
    made.need_top_p_sampling = made.need_top_k_sampling = False
    return made


@pytest.mark.parametrize("asked", [batch, plain])
def test_a_seed_in_any_company(seed: int, asked: Callable[..., SamplingBatchInfo]) -> None:
    numbers = torch.Generator().manual_seed(seed)
    probs = torch.softmax(torch.randn(4, VOCABULARY, generator=numbers), -1)
    alone = asked(seed)
    before = merged(batch(None, None), asked(seed, 7))
    behind = merged(asked(seed), merged(batch(None), batch(None, None)))
    mixed = merged(batch(None), merged(asked(seed), batch(None, 7)))
    for position in range(20):
        (expected,) = drawn(alone, probs[:1], position)
        for info, row in ((before, 2), (behind, 0), (mixed, 1)):
            shown = probs.clone()
            shown[[0, row]] = shown[[row, 0]]
            assert drawn(info, shown, position)[row] == expected


def test_what_is_left_out_is_never_drawn() -> None:
    probs = torch.tensor([[0.1, 0.3, 0.05, 0.3, 0.25]]).repeat(3, 1)
    info = batch(1, 2, 3)
    info.top_ks = torch.tensor([1, 1 << 30, 1 << 30])
    info.top_ps = torch.tensor([1.0, 0.5, 1.0])
    info.min_ps, info.need_min_p_sampling = torch.tensor([0.0, 0.0, 0.8]), True
    kept = [[1], [1, 3], [1, 3, 4]]
    for row, weights in enumerate(seeds.filtered(probs, info)):
        assert weights.nonzero().view(-1).tolist() == kept[row]
        assert torch.equal(weights[kept[row]], probs[row][kept[row]])
    info.sampling_mask_batch_indices = torch.tensor([2])
    positions = torch.tensor([9, 9, 9])
    tokens, captured = seeds.sample(None, None, probs, info, positions, False)
    assert all(token in kept[row] for row, token in enumerate(tokens.tolist()))
    assert torch.equal(captured.selected_weight, probs[2][tokens[2:].long()])


def test_tokens_come_as_often_as_they_are_likely() -> None:
    """5,000 seeds; five standard deviations."""
    count, probs = 5000, torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    info = plain(*range(count))
    found = torch.bincount(torch.tensor(drawn(info, probs.repeat(count, 1), 3)), minlength=4)
    expected = probs[0] * count
    assert ((found - expected).abs() < 5 * (expected * (1 - probs[0])).sqrt()).all()


def test_the_others_have_seeds_that_nobody_chose() -> None:
    mixed = merged(merged(batch(None, 5), batch(None)), batch(5, None))
    given = mixed.sampling_seed
    assert given is not None and given.dtype == torch.int64
    others = given[[0, 2, 4]].tolist()
    assert given[[1, 3]].tolist() == [5, 5] and len(set(others)) == 3 and 5 not in others
    mixed.filter_batch([1, 4], torch.tensor([1, 4]))
    assert mixed.sampling_seed is not None
    assert mixed.sampling_seed.tolist() == [5, others[2]]


def test_without_a_seed_nothing_changes() -> None:
    assert merged(batch(None), batch(None, None)).sampling_seed is None
