"""What serving a family showed, and how near its answers came to the truth."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmark.models.serving import Answer
from benchmark.models.truth import Truth

# Of a float32 server from float64: sums of a few hundred terms.
NATIVE_NATS = 2e-3
# Of a server with formats: a last-bit difference may turn a rounding, and with experts another
# choice, so a mean, beside what the formats themselves change.
FORMATS_SHARE = 0.1
# What a quantization of 7 bits may change in such a model at all.
FORMATS_NATS = 1.0

# "SGLang differs": its model, without any of our formats, is not what transformers computes.
Verdict = Literal["works", "wrong", "SGLang differs", "refused", "not by SGLang"]


@dataclass(frozen=True)
class Distance:
    """|difference of a logprob| in nats over a server's tokens: of its prompts, and of what it
    said; `other`: tokens said that the truth holds for clearly less likely than the best."""

    prompt: float
    said: float
    largest: float
    other: int

    @property
    def mean(self) -> float:
        return (self.prompt + self.said) / 2


def distance(answers: list[Answer], truths: list[torch.Tensor], clear: float) -> Distance:
    """`truths`: of each answer logprobs [prompt + tokens - 1, vocabulary]."""
    prompt, said, other = [], [], 0
    for answer, truth in zip(answers, truths, strict=True):
        first = len(answer.prompt) - 1
        following = torch.tensor([*answer.prompt[1:], *answer.tokens])
        theirs = torch.tensor([*answer.prompt_logprobs, *answer.logprobs], dtype=torch.float64)
        ours = truth.gather(1, following[:, None])[:, 0]
        differences = (ours - theirs).abs()
        prompt += differences[:first].tolist()
        said += differences[first:].tolist()
        other += int((truth.max(-1).values - ours > clear)[first:].sum())
    return Distance(
        prompt=math.fsum(prompt) / len(prompt),
        said=math.fsum(said) / len(said),
        largest=max(*prompt, *said),
        other=other,
    )


@dataclass(frozen=True)
class Measured:
    """`native`: the native server from transformers, None if it was refused; `formats`: the bfp8
    server from transformers with our formats; `cost`: the bfp8 server from transformers without,
    and `between` from the native server on the same prompts."""

    native: Distance | None
    formats: Distance
    cost: Distance
    between: float | None

    def verdict(self) -> tuple[Verdict, str]:
        """With the reason, or with what is to be said of the native server. NaN is never near."""
        native = ""
        if self.native and (not self.native.largest <= NATIVE_NATS or self.native.other):
            native = f"native logprobs are up to {self.native.largest:.1e} nats off"
        if not self.formats.mean <= FORMATS_SHARE * self.cost.mean:
            far = (
                f"bfp8 is {self.formats.mean:.1e} nats from transformers with the same formats, "
                f"{self.cost.mean:.1e} from transformers without"
            )
            return ("SGLang differs", native) if native else ("wrong", far)
        if not self.cost.mean <= FORMATS_NATS:
            return "wrong", f"bfp8 changes a logprob by {self.cost.mean:.2f} nats"
        return "works", native


def measure(truth: Truth, native: list[Answer] | None, bfp8: list[Answer]) -> Measured:
    formats = [truth.bfp8(answer.prompt, answer.tokens) for answer in bfp8]
    without = [truth.native(answer.prompt, answer.tokens) for answer in bfp8]
    measured = Measured(
        native=None,
        formats=distance(bfp8, formats, math.inf),
        cost=distance(bfp8, without, math.inf),
        between=None,
    )
    if native is None:
        return measured
    plain = [truth.native(answer.prompt, answer.tokens) for answer in native]
    differences = [
        abs(one - other)
        for a, b in zip(native, bfp8, strict=True)
        for one, other in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True)
    ]
    between = math.fsum(differences) / len(differences)
    return replace(measured, native=distance(native, plain, NATIVE_NATS), between=between)
