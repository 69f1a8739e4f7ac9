"""Prefill pages that are on their way: freed by their owner, but not handed out again yet.

Pages leave while the request still computes, under the ids that it was given. When its rows enter
the radix cache, SGLang frees those pages of which the cache has a copy already (the same prompt
before it, or beside it) and points the request to the copy. A write in flight, or a range that
decode asks for again, still reads the freed ones.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from typing_extensions import override

# Writes end within Mooncake's own limits, which are shorter.
PATIENCE_S = 90.0

PageIds = npt.NDArray[np.integer[Any]]


class PageHolds:
    """How many transfers read each page. Any thread."""

    def __init__(self, pages: int) -> None:
        self._counts = np.zeros(pages + 1, dtype=np.int32)
        self._total = 0
        self._lock = threading.Lock()

    def hold(self, pages: PageIds) -> None:
        with self._lock:
            np.add.at(self._counts, pages, 1)
            self._total += len(pages)

    def release(self, pages: PageIds) -> None:
        """Inverse of `hold`. Raises ValueError for pages that nobody holds."""
        with self._lock:
            missing = pages[self._counts[pages] < 1]
            if len(missing):
                raise ValueError(f"pages {missing.tolist()} are not held")
            np.subtract.at(self._counts, pages, 1)
            self._total -= len(pages)

    def any(self) -> bool:
        return self._total > 0

    def held(self, pages: PageIds) -> npt.NDArray[np.bool_]:
        with self._lock:
            return self._counts[pages] > 0


class HoldingAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's page allocator; pages that are freed while they are held wait until they are not."""

    @override
    def __init__(self, size: int, page_size: int, *args: Any, **kwargs: Any) -> None:
        self.holds = PageHolds(size // page_size)
        self._parked: list[torch.Tensor] = []
        super().__init__(size, page_size, *args, **kwargs)

    @property
    def parked_tokens(self) -> int:
        """Tokens of pages that are neither owned nor free."""
        return sum(len(ids) for ids in self._parked) * int(self.page_size)

    @override
    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        ids = torch.cat(page_ids)
        if self.holds.any():
            held = torch.from_numpy(self.holds.held(ids.cpu().numpy())).to(ids.device)
            self._parked += [ids[held]] if bool(held.any()) else []
            ids = ids[~held]
        super()._release_page_ids(ids)

    def _reclaim(self) -> None:
        if self._parked:
            parked, self._parked = self._parked, []
            self._release_page_ids(*parked)

    @override
    def available_size(self) -> int:
        self._reclaim()
        return int(super().available_size())

    @override
    def alloc(self, *args: Any, **kwargs: Any) -> Any:
        return self._patiently(super().alloc, args, kwargs)

    @override
    def alloc_extend(self, *args: Any, **kwargs: Any) -> Any:
        return self._patiently(super().alloc_extend, args, kwargs)

    def _patiently(self, alloc: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """SGLang counts pages that it has just evicted as free, and dies if they are not: so wait
        for those that are still on their way."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self._reclaim()
            result = alloc(*args, **kwargs)
            if result is not None or not self._parked or time.monotonic() > deadline:
                return result
            time.sleep(1e-3)

    @override
    def clear(self) -> None:
        self._parked = []
        super().clear()
