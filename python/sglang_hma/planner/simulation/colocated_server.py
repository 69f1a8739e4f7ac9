"""An instance that does both: prefill in chunks between decode steps, or in the same passes."""

from collections import deque
from dataclasses import dataclass, field
from functools import partial

from sglang_hma.planner.simulation.batch import Batch, KVMemory
from sglang_hma.planner.simulation.clock import Clock
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.simulation.prefill_server import finish, take
from sglang_hma.planner.simulation.prefix_cache import PrefixCache
from sglang_hma.planner.simulation.stepper import Stepper
from sglang_hma.planner.step_times import StepTimes


@dataclass(eq=False)
class ColocatedServer:
    """mixed: SGLang's --enable-mixed-chunk. Without it a waiting prompt goes before decoding."""

    clock: Clock
    times: StepTimes
    memory: KVMemory
    chunk_tokens: int
    cache: PrefixCache
    mixed: bool = False
    overhead_s: float = 0.0
    batch: Batch = field(init=False)
    queue: deque[Job] = field(default_factory=deque)
    """Those that wait for pages."""
    prompts: deque[Job] = field(default_factory=deque)
    """Those whose prompts are computed next."""
    load: int = 0
    """Requests that have come and not finished."""
    _in_pass: bool = False
    _stepper: Stepper = field(init=False)

    def __post_init__(self) -> None:
        self.batch = Batch(self.memory)
        self._stepper = Stepper(self.clock, self.times, self.batch, self.overhead_s, self._ended)

    def submit(self, job: Job) -> None:
        """Raises NeverFits."""
        self.load += 1
        self.queue.append(job)
        self._admit()
        if self._in_pass:
            return
        if not self._stepper.running:
            self._begin()
        elif self.prompts:
            self._stepper.stop_by(self._stepper.over + 1)

    def _admit(self) -> None:
        while self.queue and self.batch.admit(self.queue[0], self._stepper.over):
            self.prompts.append(self.queue.popleft())

    def _begin(self) -> None:
        while len(self.batch) > 1 and not self.batch.until_change():
            job = self.batch.retract()
            job.known = job.computed = 0  # its prompt is computed again
            self.queue.appendleft(job)
        if self.prompts:
            self._begin_pass()
        elif len(self.batch):
            self._stepper.run()

    def _begin_pass(self) -> None:
        size = len(self.batch) if self.mixed else 0
        batch = take(self.prompts, self.cache, max(1, self.chunk_tokens - size))
        parts = [(new, job.known + job.computed) for job, new in batch]
        duration = self.overhead_s + self.times.prefill_s(*parts, *[(1, 0)] * size)
        if size:
            tokens = (self.batch.prompt_tokens, self.batch.new_tokens)
            duration += self.times.decode_s(size, *tokens) - self.times.decode_s(size, 0)
        self._in_pass = True
        self.clock.at(self.clock.now + duration, partial(self._end_pass, batch, bool(size)))

    def _end_pass(self, batch: list[tuple[Job, int]], decoded: bool) -> None:
        now = self.clock.now
        self._in_pass = False
        if decoded:
            self.load -= len(self.batch.advance(1, now))
        for job in finish(batch, self.cache, now):
            self.prompts.remove(job)
            self.load -= 0 if self.batch.join(job, now) else 1
        self._admit()
        self._begin()

    def _ended(self, done: list[Job]) -> None:
        self.load -= len(done)
        self._admit()
        self._begin()
