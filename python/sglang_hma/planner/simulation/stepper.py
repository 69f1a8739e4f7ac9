"""Runs a batch's decode steps on the clock, from one change of the batch to the next."""

from collections.abc import Callable
from dataclasses import dataclass

from sglang_hma.planner.simulation.batch import Batch
from sglang_hma.planner.simulation.clock import Clock
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.simulation.steps import Steps
from sglang_hma.planner.step_times import StepTimes


@dataclass(eq=False)
class Stepper:
    """`ended` is called with those that have finished, after the last step of a run."""

    clock: Clock
    times: StepTimes
    batch: Batch
    ended: Callable[[list[Job]], None]
    _steps: Steps | None = None
    _turn: int = 0

    @property
    def running(self) -> bool:
        return self._steps is not None

    @property
    def over(self) -> int:
        """Steps of this run that are over."""
        return self._steps.over(self.clock.now) if self._steps else 0

    @property
    def step_end(self) -> float:
        """Of the step that runs."""
        assert self._steps is not None
        return self._steps.end(self.over + 1)

    def run(self) -> None:
        """Until one finishes or memory is full, one step at least."""
        batch = self.batch
        count, size = max(1, batch.until_change()), len(batch)
        first = self._step_s(batch.new_tokens)
        last = self._step_s(batch.new_tokens + (count - 1) * size)
        growth = max(0.0, last - first) / (count - 1) if count > 1 else 0.0
        self._steps = Steps(self.clock.now, count, first, growth)
        self._stop_at(count)

    def stop_by(self, step: int) -> None:
        """End this run after `step` steps, if not before."""
        steps = self._steps
        if steps is not None and step < steps.count:
            self._steps = Steps(steps.begin, step, steps.first_s, steps.growth_s)
            self._stop_at(step)

    def _step_s(self, new_tokens: int) -> float:
        batch = self.batch
        return self.times.decode_s(len(batch), batch.prompt_tokens, new_tokens)

    def _stop_at(self, step: int) -> None:
        assert self._steps is not None
        self._turn += 1
        turn = self._turn

        def end() -> None:
            if turn == self._turn:
                self._steps = None
                self.ended(self.batch.advance(step, self.clock.now))

        self.clock.at(self._steps.end(step), end)
