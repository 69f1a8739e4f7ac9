"""A request with a seed says the same in whatever company, and the others go on as before."""

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers import sampler
from sglang.srt.layers.sampler import (
    sampling_from_probs_torch,
    top_k_top_p_min_p_sampling_from_probs_torch,
)
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


def drawn(info: SamplingBatchInfo, probs: torch.Tensor, position: int) -> Any:
    positions = torch.full((len(probs),), position)
    given = (info.top_ks, info.top_ps, info.min_ps, False, info.sampling_seed, positions)
    several = top_k_top_p_min_p_sampling_from_probs_torch(probs.clone(), *given)
    one = sampling_from_probs_torch(
        probs.clone(), sampling_seed=info.sampling_seed, positions=positions
    )
    return several.tolist(), one.tolist()


def test_a_seed_in_any_company(seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    probs = torch.softmax(torch.randn(4, VOCABULARY, generator=numbers), -1)
    alone = batch(seed)
    before = merged(batch(None, None), batch(seed, 7))
    behind = merged(batch(seed), merged(batch(None), batch(None, None)))
    mixed = batch(None, seed, None, 7)
    for position in range(20):
        expected = drawn(alone, probs[:1], position)
        for info, row in ((before, 2), (behind, 0), (mixed, 1)):
            shown = probs.clone()
            shown[[0, row]] = shown[[row, 0]]
            found = drawn(info, shown, position)
            assert (found[0][row], found[1][row]) == (expected[0][0], expected[1][0])


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
