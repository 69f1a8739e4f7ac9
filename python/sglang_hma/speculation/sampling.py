"""SGLang's own sampler over the rows of chains, so that each target is what a step of its own
would have said: greedy or sampled, with logprobs, bias and seed.

Penalties, grammars, minimum lengths and custom processors depend on the tokens right before. They
are applied as they are at a chain's first row, whose target always counts; requests that use them
say one token at a time (`most_said`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch


def most_said(reqs: Sequence[Any], width: int) -> list[int]:
    """How many tokens of a chain each request may say."""
    return [1 if _looks_back(req) else width for req in reqs]


def _looks_back(req: Any) -> bool:
    params = req.sampling_params
    return bool(
        req.grammar is not None
        or req.custom_logit_processor is not None
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.repetition_penalty != 1
        or len(req.output_ids) < params.min_new_tokens
    )


def of_rows(info: Any, width: int) -> Any:
    """SGLang's SamplingBatchInfo of each row of the chains, `width` to a request."""

    def rows(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.repeat_interleave(width, dim=0)

    per_request = (
        *("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed", "logit_bias"),
        *("acc_additive_penalties", "acc_scaling_penalties"),
    )
    first_rows: dict[str, Any] = {}
    if info.grammars:
        first_rows["grammars"] = [
            grammar if row == 0 else None for grammar in info.grammars for row in range(width)
        ]
    if info.custom_params is not None:
        first_rows["custom_params"] = [each for each in info.custom_params for _ in range(width)]
    if info.custom_logit_processor:
        first_rows["custom_logit_processor"] = {
            key: dataclasses.replace(
                entry, rows=[row * width for row in entry.rows], indices=entry.indices * width
            )
            for key, entry in info.custom_logit_processor.items()
        }
    return dataclasses.replace(
        info, **{name: rows(getattr(info, name)) for name in per_request}, **first_rows
    )


def sample(runner: Any, batch: Any, logits_output: Any, positions: torch.Tensor) -> torch.Tensor:
    """What the model says after each token of the chains, int64 [requests, width]; logprobs go
    into `logits_output` as SGLang's result processor wants them.

    positions: int64 [requests * width], of the chains' tokens.
    """
    requests = len(batch.reqs)
    width = len(positions) // requests
    info = of_rows(batch.sampling_info, width)
    info.update_regex_vocab_mask()
    info.apply_logits_bias(logits_output.next_token_logits)
    info.grammar_mask = None
    nums, ids = batch.top_logprobs_nums or [], batch.token_ids_logprobs or []
    targets = runner.sampler(
        logits_output,
        info,
        batch.return_logprob,
        [each for each in nums for _ in range(width)],
        [each for each in ids for _ in range(width)],
        positions,
    )
    if batch.return_logprob:
        logprobs = logits_output.next_token_logprobs
        logits_output.next_token_logprobs = logprobs.view(requests, width)
    return targets.long().view(requests, width)
