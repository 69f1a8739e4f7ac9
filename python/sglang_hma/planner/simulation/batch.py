"""The requests that a server decodes together, and the memory that their KV takes."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from sglang_hma.planner.problem import Problem
from sglang_hma.planner.simulation.job import Job

RESERVED_TOKENS = 512  # SGLang's default of --num-reserved-decode-tokens (0.5.23)


class NeverFits(Problem):
    """A request that is larger than a server's memory."""


@dataclass(frozen=True)
class KVMemory:
    """bytes, and what a token takes of them where it was in the prompt, and where it is new."""

    bytes: float
    prompt: float
    new: float


@dataclass(eq=False)
class Batch:
    memory: KVMemory
    steps: int = 0
    """Decode steps since the beginning."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    """Of those that run."""
    held: float = 0.0
    """Bytes of those that have been admitted and do not run yet."""
    waiting: int = 0
    _running: dict[Job, int] = field(default_factory=dict)
    _ends: list[tuple[int, int, Job]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=count)

    def __len__(self) -> int:
        return len(self._running)

    def used(self, ahead: int = 0) -> float:
        """Bytes, `ahead` steps from now."""
        new = self.new_tokens + ahead * len(self._running)
        return self.held + self.prompt_tokens * self.memory.prompt + new * self.memory.new

    def size_of(self, job: Job) -> float:
        return job.request.input_tokens * self.memory.prompt + job.generated * self.memory.new

    def admit(self, job: Job, ahead: int = 0) -> bool:
        """Hold its prompt's pages, if they fit with what is kept for every request's next tokens.

        Raises NeverFits.
        """
        need, kept = self.size_of(job), RESERVED_TOKENS * self.memory.new
        most = job.request.input_tokens * self.memory.prompt
        most += job.request.output_tokens * self.memory.new
        if max(most, need + kept) > self.memory.bytes:
            raise NeverFits(
                f"a request of {job.request.input_tokens} and {job.request.output_tokens} tokens "
                f"takes {max(most, need + kept) / 1e9:.1f} GB of KV; an instance has "
                f"{self.memory.bytes / 1e9:.1f} GB"
            )
        active = len(self) + self.waiting + 1
        if self.used(ahead) + need + active * kept > self.memory.bytes:
            return False
        self.held += need
        self.waiting += 1
        return True

    def join(self, job: Job, now: float) -> bool:
        """An admitted one runs from now on. False if its first token was also its last."""
        self.held -= self.size_of(job)
        self.waiting -= 1
        if not self.waiting:
            self.held = 0.0  # what is left is rounding
        if job.generated == 0:
            job.generated = 1
            job.first_token_at = now
        left = job.request.output_tokens - job.generated
        if left == 0:
            job.finished_at = now
            return False
        end = self.steps + left
        self._running[job] = end
        heapq.heappush(self._ends, (end, next(self._order), job))
        self.prompt_tokens += job.request.input_tokens
        self.new_tokens += job.generated
        return True

    def room(self, ahead: int = 0) -> int:
        """Steps that memory has room for after `ahead` ones."""
        free = self.memory.bytes - self.used(ahead)
        return max(0, int(free / (len(self._running) * self.memory.new)))

    def until_change(self) -> int:
        """Steps until one finishes or memory is full; 0 if it is full now."""
        while self._running.get(self._ends[0][2]) != self._ends[0][0]:
            heapq.heappop(self._ends)
        return min(self._ends[0][0] - self.steps, self.room())

    def advance(self, steps: int, now: float) -> list[Job]:
        """Those that finish with the last of these steps."""
        self.steps += steps
        self.new_tokens += steps * len(self._running)
        done = []
        while self._ends and self._ends[0][0] <= self.steps:
            end, _, job = heapq.heappop(self._ends)
            if self._running.get(job) == end:
                job.finished_at = now
                self._leave(job, job.request.output_tokens)
                done.append(job)
        return done

    def retract(self) -> Job:
        """Take out the one that has made the fewest tokens; it comes back with what it has made."""
        job = min(self._running, key=self._generated)
        self._leave(job, self._generated(job))
        job.retractions += 1
        return job

    def _generated(self, job: Job) -> int:
        return job.request.output_tokens - (self._running[job] - self.steps)

    def _leave(self, job: Job, generated: int) -> None:
        del self._running[job]
        job.generated = generated
        self.prompt_tokens -= job.request.input_tokens
        self.new_tokens -= generated
