"""Returned pages that the device may still use.

Work on a device runs later than the scheduler's thread goes on. When a request ends, one more step
of it may be on its way (overlap scheduling), which writes a row to a page that was returned
meanwhile; a landed page is returned while it is still being unpacked. What a later step writes
comes after that, in the stream's order. What a peer writes does not: so a returned page is handed
out again only when all work that was enqueued before its return has run.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

make_event: Callable[[], Any] = torch.cuda.Event


class Fence(Protocol):
    """A point in the device's work."""

    def passed(self) -> bool:
        """Whether all work before it has run."""

    def wait(self) -> None:
        """Until it has."""


class NoFence:
    """Of a device that has run everything when a call returns: the CPU."""

    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class StreamFence:
    """All that has been enqueued in the current CUDA stream and in `others`."""

    def __init__(self, others: Sequence[Any] = ()) -> None:
        self._events: list[Any] = [make_event() for _ in range(1 + len(others))]
        self._events[0].record()
        for event, stream in zip(self._events[1:], others, strict=True):
            event.record(stream)

    def passed(self) -> bool:
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        for event in self._events:
            event.synchronize()


class HeldPages:
    """Page ids, oldest return first. Only the scheduler's thread uses it."""

    def __init__(self, make_fence: Callable[[], Fence]) -> None:
        """`make_fence` gives the present point in the device's work."""
        self._make_fence = make_fence
        self._entries: deque[tuple[torch.Tensor, Fence]] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def hold(self, pages: torch.Tensor) -> None:
        """pages: int [n], on any device; read when the fence has passed."""
        if pages.device.type != "cpu":
            here = torch.empty(pages.shape, dtype=pages.dtype, pin_memory=True)
            pages = here.copy_(pages, non_blocking=True)
        self._entries.append((pages, self._make_fence()))
        self._count += len(pages)

    def take(self, *, wait: bool = False) -> list[int]:
        """Those that the device is done with; with `wait` all, when it is."""
        taken: list[int] = []
        while self._entries:
            pages, fence = self._entries[0]
            if wait:
                fence.wait()
            elif not fence.passed():
                break
            self._entries.popleft()
            taken += pages.tolist()
        self._count -= len(taken)
        return taken
