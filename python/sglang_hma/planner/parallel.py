"""The same question to many things, side by side."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# A fork of a process with threads, and a progress bar has one, can wait for ever for a lock.
CONTEXT = get_context("forkserver")
# What answers need, imported once and not by each worker.
CONTEXT.set_forkserver_preload(["sglang_hma.planner.search"])

_function: Callable[[Any], Any] | None = None
"""A worker process's own, given when it starts."""


def each(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    processes: int | None = None,
    heard: Callable[[int, R], object] = lambda index, result: None,
) -> list[R]:
    """In the order of `items`, whichever is done first; `heard` is told at once.

    function, items: what can be pickled, if there is more than one process. The first exception is
    raised, and what has not begun by then never does.
    """
    if (processes or os.cpu_count() or 1) == 1 or len(items) <= 1:
        results = []
        for index, item in enumerate(items):
            results.append(function(item))
            heard(index, results[-1])
        return results
    found: dict[int, R] = {}
    with ProcessPoolExecutor(processes, CONTEXT, _keep, (function,)) as pool:
        futures = {pool.submit(_call, item): index for index, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                index = futures[future]
                found[index] = future.result()
                heard(index, found[index])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[index] for index in range(len(items))]


def _keep(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    threading.Thread(target=_end_with_the_asker, daemon=True).start()


def _end_with_the_asker() -> None:
    """A worker whose asker was killed would wait for its next question for ever."""
    asker = parent_process()
    assert asker is not None
    asker.join()
    os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
