"""A prefill instance: a queue, passes of at most a chunk of tokens, pages sent as they appear."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from sglang_hma.planner.simulation.clock import Clock
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.simulation.prefix_cache import PrefixCache
from sglang_hma.planner.step_times import StepTimes


@dataclass(frozen=True)
class Produced:
    """Pages of one prompt that a pass makes or has found; `last`: of the prompt."""

    tokens: int
    begin: float
    end: float
    last: bool


Send = Callable[[Job, Produced], None]


@dataclass(eq=False)
class PrefillServer:
    """`send` is called when a pass begins, once for each prompt in it."""

    clock: Clock
    times: StepTimes
    chunk_tokens: int
    cache: PrefixCache
    send: Send
    max_prompts: int = 1 << 30
    """In one pass: SGLang's --prefill-max-requests."""
    queue: deque[Job] = field(default_factory=deque)
    _busy: bool = False

    def submit(self, job: Job) -> None:
        self.queue.append(job)
        self._begin()

    def _begin(self) -> None:
        if self._busy or not self.queue:
            return
        self._busy = True
        batch = take(self.queue, self.cache, self.chunk_tokens, self.max_prompts)
        duration = self.times.prefill_s(*((new, job.known + job.computed) for job, new in batch))
        begin, end = self.clock.now, self.clock.now + duration
        for job, new in batch:
            if not job.computed:
                job.prefill_at = begin
            found = 0 if job.computed else job.known
            last = job.known + job.computed + new == job.request.input_tokens
            self.send(job, Produced(found + new, begin, end, last))
        self.clock.at(end, partial(self._end, batch))

    def _end(self, batch: list[tuple[Job, int]]) -> None:
        for job in finish(batch, self.cache, self.clock.now):
            self.queue.remove(job)
        self._busy = False
        self._begin()


def take(
    queue: deque[Job], cache: PrefixCache, chunk_tokens: int, max_prompts: int = 1 << 30
) -> list[tuple[Job, int]]:
    """The prompts of the next pass in order of arrival, and how many tokens of each."""
    batch: list[tuple[Job, int]] = []
    room = chunk_tokens
    for job in queue:
        if not job.computed:
            job.known = cache.match(job.request)
        new = min(room, job.request.input_tokens - job.known - job.computed)
        batch.append((job, new))
        room -= new
        if not room or len(batch) == max_prompts:
            break
    return batch


def finish(batch: list[tuple[Job, int]], cache: PrefixCache, now: float) -> list[Job]:
    """Note what a pass has computed; the jobs whose prompts are done."""
    done = []
    for job, new in batch:
        job.computed += new
        if job.known + job.computed == job.request.input_tokens:
            job.prefilled_at = now
            cache.insert(job.request)
            done.append(job)
    return done
