"""Which pages the tokens of a request open, by format, and which slots they have there."""

import numpy as np
import numpy.typing as npt

from hma_kernels.layout import PAGE


def page_counts(start: int, prompt_end: int, end: int) -> tuple[int, int]:
    """(BFP8, BF16) pages that positions start..end of a request open."""
    first = -(-start // PAGE)
    opened = max(0, -(-end // PAGE) - first)
    full = min(max(0, prompt_end // PAGE - first), opened)
    return full, opened - full


def tail_to_come(spans: list[tuple[int, int]]) -> int:
    """BF16 pages to keep free while these spans are placed: 1 if one may be a chunk, else 0.

    A chunk ends on a page's edge, and its prompt was admitted with room for its
    part-full last page. BFP8 pages must not take the last slab that could hold it.
    Only one prompt at a time is in chunks.
    """
    return int(any(end % PAGE == 0 for _, end in spans))


def slots_of(pages: list[int], start: int, end: int, last_slot: int) -> npt.NDArray[np.int64]:
    """Token slots of positions start..end: the rest of the page of `last_slot`, then `pages`."""
    head = min(-start % PAGE, end - start)
    first = np.arange(last_slot + 1, last_slot + 1 + head, dtype=np.int64)
    rest = (np.asarray(pages, dtype=np.int64)[:, None] * PAGE + np.arange(PAGE)).reshape(-1)
    return np.concatenate([first, rest[: end - start - head]])
