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
    """Around Sampler._sample_from_probs: tokens int32 [batch], and what it captured of the weights.

    SGLang draws a column of a request's sorted probabilities where its batch has a request with
    top_k, top_p or min_p, greedy ones included, and a token's own column where not: the answer
    would depend on its company. With min_p and seeds it raises, and FlashInfer's kernels take no
    seeds.
    """
    info, seeds = sampling_info, sampling_info.sampling_seed
    if seeds is None:
        return original(sampler, probs, info, positions, simple_sampling_case)
    from sglang.srt.layers.sampler import _SamplingMaskCapture, multinomial_with_seed

    weights = probs if simple_sampling_case else filtered(probs, info)
    drawn = multinomial_with_seed(weights.double().log_(), seeds, positions).view(-1)
    captured, rows = None, info.sampling_mask_batch_indices
    if rows is not None:
        shown = weights[rows]
        chosen = shown.gather(1, drawn[rows].view(-1, 1)).view(-1)
        captured = _SamplingMaskCapture(shown, None, chosen, rows)
    return drawn.to(torch.int32), captured


def filtered(probs: torch.Tensor, info: Any) -> torch.Tensor:
    """float [batch, vocabulary]: 0 for what top_k, top_p and min_p leave out of each row. Of tokens
    that are as likely as each other the first ones stay."""
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ordered.shape[-1], device=probs.device)[None]
    before = ordered.cumsum(-1) - ordered
    top_ps = info.top_ps[:, None]
    out = (ranks >= info.top_ks[:, None]) | ((before > top_ps) & (top_ps < 1))
    if info.need_min_p_sampling:
        out |= ordered < ordered[:, :1] * info.min_ps[:, None]
    return torch.empty_like(probs).scatter_(-1, tokens, ordered.masked_fill_(out, 0))
