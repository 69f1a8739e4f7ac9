"""Greedy answers, and where two of them part."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.quality.text import sources

NEAR_TIE = 0.25  # of a logprob: BF16 logits of about 16 are 0.125 apart


@dataclass
class Greedy:
    """Tokens, the logprob of each, and its lead over the second best."""

    tokens: list[int]
    logprobs: list[float]
    leads: list[float]

    @classmethod
    def of(cls, reply: dict[str, Any]) -> "Greedy":
        top = reply["meta_info"]["output_top_logprobs"]
        return cls(
            list(reply["output_ids"]),
            [pair[0][0] for pair in top],
            [pair[0][0] - pair[1][0] for pair in top],
        )


def prompts_of(tokenizer: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Beginnings of held-out source files, one a length, all different."""
    found: list[list[int]] = []
    wanted = sorted(lengths, reverse=True)
    for text in sources(held_out=True):
        ids = tokenizer.encode(text[:20000], add_special_tokens=False)
        if len(found) < len(wanted) and len(ids) >= wanted[len(found)]:
            found.append(ids[: wanted[len(found)]])
    if len(found) < len(wanted):
        raise ValueError(f"{len(found)} texts are long enough, not {len(wanted)}")
    return found


def transformers_greedy(model_path: Path, prompts: list[list[int]], tokens: int) -> list[Greedy]:
    """In float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 4))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        answer, past, ids = Greedy([], [], []), None, torch.tensor([prompt])
        for _ in range(tokens):
            with torch.inference_mode():
                out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            best = out.logits[0, -1].log_softmax(-1).topk(2)
            answer.tokens.append(int(best.indices[0]))
            answer.logprobs.append(float(best.values[0]))
            answer.leads.append(float(best.values[0] - best.values[1]))
            ids = best.indices[:1][None]
        answers.append(answer)
    return answers


def compare(name: str, ours: list[Greedy], theirs: list[Greedy]) -> tuple[str, int]:
    """How many answers are the same, and how clear the choice was where they first differ; then how
    many differ though it was clear."""
    same, ties, wrong, compared, apart = 0, 0, [], 0, [0.0]
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        pairs = list(zip(a.tokens, b.tokens, strict=True))
        first = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        compared += first
        apart += [abs(x - y) for x, y in zip(a.logprobs[:first], b.logprobs[:first], strict=True)]
        if first == len(pairs):
            same += 1
        elif min(a.leads[first], b.leads[first]) <= NEAR_TIE:
            ties += 1
        else:
            wrong.append(f"#{index} at {first}: leads {a.leads[first]:.2f}, {b.leads[first]:.2f}")
    verdict = f"{len(wrong)} DIFFER ({'; '.join(wrong)})" if wrong else "none differ otherwise"
    text = (
        f"{name}: {same} of {len(ours)} answers the same, {ties} part at a near tie "
        f"(lead <= {NEAR_TIE}), {verdict}; {compared} tokens compared, logprobs apart by "
        f"{statistics.median(apart):.4f} in the median, {max(apart):.4f} at most"
    )
    return text, len(wrong)
