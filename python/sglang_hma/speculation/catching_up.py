"""How a draft model comes to have the KV of the tokens that requests have so far."""

from collections.abc import Sequence
from typing import Any

# Of tokens that a draft model lacks, in one step of the batch: what answers in progress wait for.
PROMPT_TOKENS_A_STEP = 1024


def shares(gaps: Sequence[int], budget: int) -> list[int]:
    """How many of the tokens that each request lacks, its last one among them, are computed in
    this step: `budget` in all, of the requests that lack fewest first."""
    counts = [0] * len(gaps)
    for i in sorted(range(len(gaps)), key=gaps.__getitem__):
        counts[i] = min(gaps[i], budget)
        budget -= counts[i]
    return counts


def tokens_of(req: Any, start: int, end: int) -> list[int]:
    """Tokens start..end of a request's prompt and answer."""
    prompt, answer = req.origin_input_ids_unpadded, req.output_ids
    behind = len(prompt)
    return [*prompt[start:end], *answer[max(start - behind, 0) : max(end - behind, 0)]]
