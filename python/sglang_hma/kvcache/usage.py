"""How many pages of each format are handed out, for /metrics."""

from collections.abc import Callable
from typing import Any, TypeVar

from sglang_hma.gauges import GAUGES

Allocator = TypeVar("Allocator")
Usage = tuple[int, int]
"""Pages handed out, and pages of the same format that there could be as things are."""


def show_usage(allocator: Allocator, page_format: str, usage: Callable[[Allocator], Usage]) -> None:
    """From now on, as long as the allocator lives."""
    GAUGES.gauge(
        "kv_pages_used",
        "Pages handed out, those of the prefix cache too",
        allocator,
        lambda there: usage(there)[0],
        format=page_format,
    )
    GAUGES.gauge(
        "kv_pages_total",
        "Pages handed out, and those that could be if no more were taken in another format",
        allocator,
        lambda there: usage(there)[1],
        format=page_format,
    )


def pool_label(pool: Any) -> str:
    """Behind a format's name: SGLang calls the pool of layers with a window SWA where a model has
    two pools."""
    return " window" if getattr(pool, "allocation_label", None) == "SWA" else ""
