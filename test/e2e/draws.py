"""Whether an answer that was drawn with a seed is the same where floats are rounded otherwise."""

from typing import Any

import torch

from sglang_hma.cpu_ops import murmur_hash32

from .client import FLIPPED_ROUNDING


def noise(seed: int, position: int, vocabulary: int) -> torch.Tensor:
    """Gumbel noise, float64 [vocabulary], of a token's place, as SGLang draws it with a seed."""
    numbers, places = torch.tensor([seed]), torch.tensor([position])
    hashed = murmur_hash32(lambda *_: None, numbers, places, torch.arange(vocabulary))[0]
    uniform = hashed.to(torch.float64) / torch.iinfo(torch.uint32).max
    return -torch.log(-torch.log(uniform.clamp(2.0**-33, 1 - 2.0**-32)))


def is_sure(reply: dict[str, Any], prompt: int, sampling: dict[str, Any], vocabulary: int) -> bool:
    """Of a reply with all logprobs, at temperature 1, to a prompt of so many tokens. Raises
    AssertionError if a clear winner was not drawn."""
    least = sampling.get("min_p", 0.0)
    for index, shown in enumerate(reply["meta_info"]["output_top_logprobs"]):
        values = torch.tensor([value for value, *_ in shown], dtype=torch.float64)
        tokens = torch.tensor([token for _, token, *_ in shown])
        if least:
            edge = values[0] + torch.tensor(least).log()
            if bool(((values - edge).abs() < FLIPPED_ROUNDING).any()):
                return False
            values = values.masked_fill(values < edge, -torch.inf)
        likely = torch.empty(vocabulary, dtype=torch.float64).index_copy_(0, tokens, values)
        scores = likely + noise(sampling["sampling_seed"], prompt + index - 1, vocabulary)
        (first, second), (best, _) = scores.topk(2)
        if first - second < FLIPPED_ROUNDING:
            return False
        assert int(best) == reply["output_ids"][index], (index, int(best))
    return True
