"""Which role is short, and by how many instances.

The load of a role is how many instances it would keep busy without a pause, if one could be kept
so:

    prefill    the sum of its servers' busy shares; where they do not tell those, computed tokens a
               second times the model's seconds a token
    decode     the larger of
      memory     the sum of the shares of KV memory that requests hold, those whose KV is still on
                 its way too, unless prefill is short: then they wait for it
      steps      tokens a second over those of one instance at the largest batch that keeps the
                 objective of TPOT; by the model's step times, times what makes them agree with the
                 TPOT seen at the batch seen

times 1 + g, where g is by how much requests under way have grown, over the requests finished: what
arrived and was not served. A load L needs L / target instances, rounded up.

Without a model, steps say something only where the objective is missed. Then the load is as many
instances as there are, or more: to keep it they need smaller batches, and tokens a second do not
rise when batches shrink. Likewise where requests wait for decode's pages though prefill is not
short. A role that is full turns away load that nobody sees, so its load is a lower bound too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.live.roles import Decode, Prefill, Seen
from sglang_hma.planner.problem import Problem
from sglang_hma.planner.step_times import StepTimes

FULL = 0.95
# Fewer requests say too little: of 20 at random, a load is known to +-44% (95%, 1.96 / sqrt(20)).
ENOUGH = 20
LARGEST_BATCH = 1 << 16

Bound = Literal["passes", "tokens", "memory", "steps"]


class Unknown(Problem):
    """One line: what the servers do not say, and the remedy."""


@dataclass(frozen=True)
class Model:
    """Step times of one instance of each role, by the planner."""

    prefill: StepTimes
    decode: StepTimes


@dataclass(frozen=True)
class Load:
    """bound: what it was computed from. factor: of the model's step times, None without them."""

    instances: float
    bound: Bound
    at_least: bool = False
    factor: float | None = None


@dataclass(frozen=True)
class Need:
    role: str
    there: int
    load: Load
    target: float

    @property
    def utilization(self) -> float:
        return self.load.instances / self.there

    @property
    def needed(self) -> int | None:
        """Instances; None where no number is enough. Rounding of floats adds none."""
        if math.isinf(self.load.instances):
            return None
        return max(1, math.ceil(self.load.instances / self.target - 1e-9))

    @property
    def short(self) -> bool:
        return self.needed is None or self.needed > self.there


@dataclass(frozen=True)
class Advice:
    prefill: Need
    decode: Need
    growth: float


def advise(
    seen: Seen, objectives: Objectives, target: float, model: Model | None = None
) -> Advice | None:
    """None where too few requests were finished to say anything. Raises Unknown."""
    prefill, decode = seen.prefill, seen.decode
    if decode.requests < ENOUGH:
        return None
    first, last = decode.under_way
    growth = max(0.0, last - first) / decode.requests
    of_prefill = Need("prefill", len(prefill.servers), prefill_load(prefill, growth, model), target)
    load = decode_load(decode, growth, objectives, model, prefill_short=of_prefill.short)
    return Advice(of_prefill, Need("decode", len(decode.servers), load, target), growth)


def prefill_load(seen: Prefill, growth: float, model: Model | None) -> Load:
    """Raises Unknown where neither servers nor a model tell how long passes take."""
    if seen.busy is not None:
        full = sum(seen.busy) / len(seen.busy) >= FULL
        return Load(sum(seen.busy) * (1 + growth), "passes", full)
    if model is None:
        raise Unknown(
            "the prefill servers do not tell how long they compute (no "
            "sglang:scheduler_stage_seconds_total): give --model, for the planner's step times"
        )
    if not seen.requests_s:
        return Load(0.0, "tokens")
    tokens = max(1, round(seen.tokens_s / seen.requests_s))
    return Load(seen.requests_s * model.prefill.prefill_s((tokens, 0)) * (1 + growth), "tokens")


def decode_load(
    seen: Decode,
    growth: float,
    objectives: Objectives,
    model: Model | None,
    *,
    prefill_short: bool,
) -> Load:
    servers, held = len(seen.servers), sum(seen.running)
    waits = min(seen.without_pages) > 0
    full = waits or held + sum(seen.pending) >= FULL * servers
    if not prefill_short:
        held += sum(seen.pending)
        held = max(held, servers * waits)
    loads = [Load(held * (1 + growth), "memory", full)]
    tpot = seen.tpot.quantile(objectives.share)
    if model is not None and seen.batch > 0:
        loads.append(_by_steps(seen, growth, objectives, model.decode, tpot, full))
    elif tpot > objectives.tpot_s:
        loads.append(Load(servers * (1 + growth), "steps", at_least=True))
    return max(loads, key=lambda load: load.instances)


def _by_steps(
    seen: Decode,
    growth: float,
    objectives: Objectives,
    times: StepTimes,
    tpot: float,
    full: bool,
) -> Load:
    prompt, new = seen.prompt_tokens, seen.output_tokens / 2

    def step_s(batch: int) -> float:
        return times.decode_s(batch, prompt * batch, new * batch)

    factor = tpot / step_s(max(1, round(seen.batch / len(seen.servers))))
    best = largest(lambda batch: factor * step_s(batch) <= objectives.tpot_s)
    if not best:
        return Load(math.inf, "steps", factor=factor)
    rate = best / (factor * step_s(best))
    return Load(seen.tokens_s * (1 + growth) / rate, "steps", full, factor)


def largest(holds: Callable[[int], bool]) -> int:
    """Of the numbers up to LARGEST_BATCH, where it holds up to some number; 0 for none."""
    low, high = 0, LARGEST_BATCH + 1
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
