"""What a forward is asked for: new tokens of requests, each behind what is cached of its own."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hma_kernels import PAGE


@dataclass(frozen=True)
class Chunk:
    """New tokens of one request.

    tokens: int [n], n >= 1; start: tokens before them, a multiple of 32; pages: the request's page
    ids from its first token on, at least ceil((start + n) / 32).
    """

    tokens: npt.NDArray[np.integer]
    start: int
    pages: npt.NDArray[np.integer]

    def __post_init__(self) -> None:
        if self.start % PAGE:
            raise ValueError(f"a chunk starts at token {self.start}, no multiple of {PAGE}")
        if not len(self.tokens) or len(self.pages) < pages_of(self.end):
            raise ValueError(
                f"{len(self.tokens)} tokens from {self.start} on {len(self.pages)} pages"
            )

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE)
