"""A decode instance: pages promised before prefill begins, then continuous batching."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_hma.planner.simulation.batch import Batch, KVMemory
from sglang_hma.planner.simulation.clock import Clock
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.simulation.stepper import Stepper
from sglang_hma.planner.step_times import StepTimes


@dataclass(eq=False)
class DecodeServer:
    """`admitted` is called for each request when its pages are promised, in order of arrival."""

    clock: Clock
    times: StepTimes
    memory: KVMemory
    admitted: Callable[[Job], None]
    max_running: int = 1 << 30
    overhead_s: float = 0.0
    batch: Batch = field(init=False)
    queue: deque[Job] = field(default_factory=deque)
    """Those that wait for pages; retracted ones before others."""
    ready: deque[Job] = field(default_factory=deque)
    """Those whose pages are here."""
    load: int = 0
    """Requests that have come and not finished."""
    _stepper: Stepper = field(init=False)

    def __post_init__(self) -> None:
        self.batch = Batch(self.memory)
        self._stepper = Stepper(self.clock, self.times, self.batch, self.overhead_s, self._ended)

    def submit(self, job: Job) -> None:
        """Raises NeverFits."""
        self.load += 1
        self.queue.append(job)
        self._admit()

    def arrived(self, job: Job) -> None:
        """Its pages are here: it joins when the step that runs is over."""
        self.ready.append(job)
        if not self._stepper.running:
            self._begin()
            self._admit()
        elif len(self.batch) < self.max_running:
            self._stepper.stop_by(self._stepper.over + 1)

    def _admit(self) -> None:
        while self.queue and self.batch.admit(self.queue[0], self._stepper.over):
            if self._stepper.running:
                over = self._stepper.over
                self._stepper.stop_by(over + max(1, self.batch.room(over)))
            job = self.queue.popleft()
            if job.retractions:
                self.arrived(job)  # its pages were kept in the host's memory
            else:
                self.admitted(job)

    def _begin(self) -> None:
        """Let in what is ready, and run until the batch changes."""
        while self.ready and len(self.batch) < self.max_running:
            self.load -= 0 if self.batch.join(self.ready.popleft(), self.clock.now) else 1
        while len(self.batch) > 1 and not self.batch.until_change():
            self.queue.appendleft(self.batch.retract())
        if len(self.batch):
            self._stepper.run()

    def _ended(self, done: list[Job]) -> None:
        self.load -= len(done)
        self._begin()
        self._admit()
