"""A prefill and a decode server that are followed pass by pass and step by step, every token timed.

What the simulator has in closed form, written out: the truth for what is fitted to recorded runs.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_hma.planner.measured import Measured
from sglang_hma.planner.recorded import Run
from sglang_hma.planner.trace import Request


@dataclass
class PairBySteps:
    """noise: standard deviation of the logarithm of each pass's and step's time."""

    requests: Sequence[Request]
    times: Measured
    chunk_tokens: int = 8192
    noise: float = 0.0
    seed: int = 0
    prompts: dict[int, int] = field(default_factory=dict)
    """Tokens to compute of those that are in prefill, in order."""
    kept: list[int] = field(default_factory=list)
    landed: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)

    def run(self, name: str = "by steps") -> Run:
        self.rng = np.random.default_rng(self.seed)
        self.tokens: list[list[float]] = [[] for _ in self.requests]
        self.computing: list[tuple[int, int]] = []
        self.stepping = False
        self.events = [(r.arrival_s, 0, "come", i) for i, r in enumerate(self.requests)]
        self.made = 0
        while self.events:
            now, _, what, which = heapq.heappop(self.events)
            getattr(self, f"_{what}")(now, which)
        return Run(
            name,
            tuple(self.requests),
            tuple(t[0] - r.arrival_s for t, r in zip(self.tokens, self.requests, strict=True)),
            tuple(tuple(np.diff(times)) for times in self.tokens),
        )

    def _at(self, when: float, what: str, which: int = 0) -> None:
        self.made += 1
        heapq.heappush(self.events, (when, self.made, what, which))

    def _takes(self, seconds: float) -> float:
        return seconds * float(np.exp(self.rng.normal(0, self.noise)))

    def _come(self, now: float, which: int) -> None:
        self.kept.append(which)
        if not self.stepping:
            self._admit(now)

    def _admit(self, now: float) -> None:
        """The first of several begins without the others."""
        for which in self.kept:
            self.prompts[which] = self.requests[which].input_tokens
            self._compute(now)
        self.kept.clear()

    def _compute(self, now: float) -> None:
        if self.computing or not self.prompts:
            return
        room, seconds = self.chunk_tokens, self.times.prefill.pass_s
        for which, left in self.prompts.items():
            new = min(room, left)
            before = self.requests[which].input_tokens - left
            pairs = sum(range(before + 1, before + new + 1))
            seconds += new * self.times.prefill.token_s + pairs * self.times.prefill.pair_s
            self.computing.append((which, new))
            room -= new
            if not room:
                break
        self._at(now + self._takes(seconds), "computed")

    def _computed(self, now: float, _: int) -> None:
        for which, new in self.computing:
            self.prompts[which] -= new
            if not self.prompts[which]:
                del self.prompts[which]
                self._at(now + self.times.overhead_s, "land", which)
        self.computing.clear()
        self._compute(now)

    def _land(self, now: float, which: int) -> None:
        self.landed.append(which)
        if not self.stepping:
            self._step(now)

    def _step(self, now: float) -> None:
        for which in self.landed:
            self.tokens[which].append(now)
        self.running += [i for i in self.landed if self.requests[i].output_tokens > 1]
        self.landed.clear()
        self.stepping = bool(self.running)
        if self.running:
            seen = sum(self.requests[i].input_tokens + len(self.tokens[i]) for i in self.running)
            decode = self.times.decode
            seconds = decode.step_s + decode.request_s * len(self.running) + decode.seen_s * seen
            self._at(now + self._takes(seconds), "stepped")
        self._admit(now)

    def _stepped(self, now: float, _: int) -> None:
        for which in self.running:
            self.tokens[which].append(now)
        self.running = [
            i for i in self.running if len(self.tokens[i]) < self.requests[i].output_tokens
        ]
        self._step(now)
