"""An instance that does both: prefill in chunks between decode steps, or in the same passes."""

from collections import deque
from dataclasses import dataclass, field
from functools import partial

from sglang_hma.planner.simulation.batch_server import BatchServer
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.simulation.prefill_server import finish, take
from sglang_hma.planner.simulation.prefix_cache import PrefixCache


@dataclass(eq=False)
class ColocatedServer(BatchServer):
    """mixed: SGLang's --enable-mixed-chunk. Without it a waiting prompt goes before decoding."""

    chunk_tokens: int
    cache: PrefixCache
    mixed: bool
    prompts: deque[Job] = field(init=False, default_factory=deque)
    """Those whose prompts are computed next."""
    _in_pass: bool = field(init=False, default=False)

    def submit(self, job: Job) -> None:
        """Raises NeverFits."""
        self.load += 1
        self.queue.append(job)
        if self._in_pass:
            return
        if self._stepper.running:
            self._admit()
            if self.prompts:
                self._stepper.stop_by(self._stepper.over + 1)
        else:
            self._go_on()

    def _admit(self) -> None:
        while self.queue and self.batch.admit(self.queue[0], self._stepper.over):
            self.prompts.append(self.queue.popleft())

    def _go_on(self) -> None:
        self._admit()
        for job in self._make_room():
            job.known = job.computed = 0  # its prompt is computed again
        if self.prompts:
            self._begin_pass()
        elif len(self.batch):
            self._stepper.run()

    def _begin_pass(self) -> None:
        size = len(self.batch) if self.mixed else 0
        batch = take(self.prompts, self.cache, max(1, self.chunk_tokens - size))
        parts = [(new, job.known + job.computed) for job, new in batch]
        duration = self.times.prefill_s(*parts, beside=size)
        if size:
            tokens = (self.batch.prompt_tokens, self.batch.new_tokens)
            duration += self.times.decode_s(size, *tokens) - self.times.decode_s(size, 0)
        self._in_pass = True
        self.clock.at(self.clock.now + duration, partial(self._end_pass, batch, bool(size)))

    def _end_pass(self, batch: list[tuple[Job, int]], decoded: bool) -> None:
        self._in_pass = False
        if decoded:
            self.load -= len(self.batch.advance(1, self.clock.now))
        for job in finish(batch, self.cache, self.clock.now):
            self.prompts.remove(job)
            self._join(job)
        self._go_on()
