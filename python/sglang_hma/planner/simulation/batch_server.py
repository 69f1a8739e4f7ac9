"""What decodes a batch of requests, alone or beside prefill."""

from collections import deque
from dataclasses import dataclass, field

from sglang_hma.planner.simulation.batch import Batch, KVMemory
from sglang_hma.planner.simulation.clock import Clock
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.simulation.stepper import Stepper
from sglang_hma.planner.step_times import StepTimes


@dataclass(eq=False)
class BatchServer:
    clock: Clock
    times: StepTimes
    memory: KVMemory
    batch: Batch = field(init=False)
    queue: deque[Job] = field(init=False, default_factory=deque)
    """Those that wait for pages; retracted ones before others."""
    load: int = field(init=False, default=0)
    """Requests that have come and not finished."""
    _stepper: Stepper = field(init=False)

    def __post_init__(self) -> None:
        self.batch = Batch(self.memory)
        self._stepper = Stepper(self.clock, self.times, self.batch, self._ended)

    def _join(self, job: Job) -> None:
        if not self.batch.join(job, self.clock.now):
            self.load -= 1

    def _ended(self, done: list[Job]) -> None:
        """A run of steps is over."""
        self.load -= len(done)
        self._go_on()

    def _go_on(self) -> None:
        """Let in what can be let in, and run what comes next."""
        raise NotImplementedError

    def _make_room(self) -> list[Job]:
        """Retract until the batch has room for a step; those that were."""
        retracted = []
        while len(self.batch) > 1 and not self.batch.until_change():
            retracted.append(self.batch.retract())
            self.queue.appendleft(retracted[-1])
        return retracted
