"""A decode instance: pages promised before prefill begins, then continuous batching.

Nothing is let in while a step runs, as in SGLang's scheduler loop.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_hma.planner.simulation.batch_server import BatchServer
from sglang_hma.planner.simulation.job import Job


@dataclass(eq=False)
class DecodeServer(BatchServer):
    """`admitted` is called for each request when its pages are promised, in order of arrival."""

    admitted: Callable[[Job], None]
    ready: deque[Job] = field(init=False, default_factory=deque)
    """Those whose pages are here."""

    def submit(self, job: Job) -> None:
        """Raises NeverFits."""
        self.load += 1
        self.queue.append(job)
        if self._stepper.running:
            self.clock.at(self._stepper.step_end, self._admit)
        else:
            self._admit()

    def arrived(self, job: Job) -> None:
        """Its pages are here: it joins when the step that runs is over."""
        self.ready.append(job)
        if self._stepper.running:
            self._stepper.stop_by(self._stepper.over + 1)
        else:
            self._go_on()

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

    def _go_on(self) -> None:
        while self.ready:
            self._join(self.ready.popleft())
        self._make_room()
        if len(self.batch):
            self._stepper.run()
        self._admit()
