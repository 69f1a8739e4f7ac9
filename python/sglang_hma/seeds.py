"""A request's sampling_seed takes effect, on a server of any flags.

SGLang 0.5.23 has a sampler that draws each token from a seed and a position, and uses it with
--enable-deterministic-inference alone; without that flag a client's seed is ignored. Here a batch
uses it as long as it has a request with a seed. The others in such a batch get one that nobody
chose, so their tokens are drawn as randomly as before.
"""

import itertools
from typing import Any

import torch

_MASK = (1 << 64) - 1
# Ranks of a server must draw alike: they begin with the same number and count the same batches.
_numbers = itertools.count()


def unchosen() -> int:
    """A number of 63 bits that no client knows (splitmix64 of a counter and the server's seed)."""
    from sglang.srt.runtime_context import get_device

    mixed = (next(_numbers) * 0x9E3779B97F4A7C15 + int(get_device().random_seed or 0)) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) >> 1


def from_batch(original: Any, info: Any, batch: Any, vocab_size: int) -> None:
    """Around SamplingBatchInfo.adjusted_from_schedule_batch, which ends its making."""
    original(info, batch, vocab_size)
    given = [req.sampling_params.sampling_seed for req in batch.reqs]
    if info.sampling_seed is None and any(seed is not None for seed in given):
        info.sampling_seed = _tensor(info, given)


def merge_batch(original: Any, info: Any, other: Any) -> None:
    """Around SamplingBatchInfo.merge_batch, which keeps seeds only if both batches have them."""
    for one, another in ((info, other), (other, info)):
        if one.sampling_seed is None and another.sampling_seed is not None:
            one.sampling_seed = _tensor(one, [None] * len(one))
    original(info, other)


def _tensor(info: Any, seeds: list[int | None]) -> torch.Tensor:
    numbers = [unchosen() if seed is None else seed for seed in seeds]
    return torch.tensor(numbers, dtype=torch.int64).to(info.temperatures.device)


def sample(
    original: Any,
    sampler: Any,
    probs: Any,
    sampling_info: Any,
    positions: Any,
    simple_sampling_case: bool,
) -> Any:
    """Around Sampler._sample_from_probs: FlashInfer's kernels take no seeds, torch's operators do
    (several milliseconds more a step)."""
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
    from sglang.srt.runtime_context import get_exec

    info = sampling_info
    seeds = info.sampling_seed
    if seeds is None or simple_sampling_case or get_exec().kernel.sampling_backend == "pytorch":
        return original(sampler, probs, info, positions, simple_sampling_case)
    given = (info.top_ks, info.top_ps, info.min_ps, info.need_min_p_sampling)
    drawn = top_k_top_p_min_p_sampling_from_probs_torch(
        probs, *given, seeds, positions, return_filtered_probs=False, max_top_k=info.max_top_k
    )
    return drawn, None
