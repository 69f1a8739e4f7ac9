"""Continuous batching between two changes of a batch, in closed form.

A decode step takes longer with every token of context; between two changes the batch is the same,
so its steps' times grow by equal amounts, and where a step ends is a quadratic equation's answer.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Steps:
    """`count` steps from `begin` on; the first takes `first_s`, each other `growth_s` more."""

    begin: float
    count: int
    first_s: float
    growth_s: float

    def end(self, step: int) -> float:
        """When so many steps are over."""
        return self.begin + step * self.first_s + self.growth_s * step * (step - 1) / 2

    def over(self, when: float) -> int:
        """Steps that are over at `when`."""
        elapsed = when - self.begin
        if elapsed <= 0:
            return 0
        half = self.growth_s / 2
        if half <= 0:
            step = elapsed / self.first_s
        else:
            linear = self.first_s - half
            step = (math.sqrt(linear * linear + 4 * half * elapsed) - linear) / (2 * half)
        # The equation's answer is a rounding away from a whole number where `when` is a step's end.
        whole = min(self.count, max(0, int(step + 1e-9)))
        while whole < self.count and self.end(whole + 1) <= when:
            whole += 1
        while whole and self.end(whole) > when:
            whole -= 1
        return whole
