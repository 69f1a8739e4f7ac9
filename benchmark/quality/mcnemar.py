"""Whether two systems that answered the same questions differ.

McNemar's test (Psychometrika 12, 1947) in its exact form: of the questions that only one of them
got right, either is as likely if neither is better, so their number is binomial.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    questions: int
    both: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Of the shares of right answers, first minus second."""
        return (self.only_first - self.only_second) / self.questions

    @property
    def error(self) -> float:
        """Standard error of the difference: the variance of a mean of +1, 0 and -1."""
        differing = (self.only_first + self.only_second) / self.questions
        return math.sqrt(max(differing - self.difference**2, 0) / self.questions)

    @property
    def p_value(self) -> float:
        """Two-sided, exact."""
        n, less = self.only_first + self.only_second, min(self.only_first, self.only_second)
        tail = sum(math.comb(n, k) for k in range(less + 1))
        return min(1.0, 2 * tail / 2**n)


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    both = list(zip(first, second, strict=True))
    return Paired(
        questions=len(both),
        both=both.count((True, True)),
        only_first=both.count((True, False)),
        only_second=both.count((False, True)),
    )
