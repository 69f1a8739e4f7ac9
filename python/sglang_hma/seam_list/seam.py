"""What an entry of the list says."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_hma.config import HmaConfig


@dataclass(frozen=True)
class Seam:
    """One hooked SGLang object. `load` returns the class that replaces it, or the
    function that wraps it and gets the original as its first argument."""

    target: str
    reason: str
    load: Callable[[], Any]
    applies: Callable[[HmaConfig], bool]
    when: str  # what `applies` says


@dataclass(frozen=True)
class PluginPoint:
    """Something that SGLang offers to plugins, and what it is given."""

    point: str
    ours: str
    reason: str


def ours(module: str, name: str) -> Callable[[], Any]:
    """Loads `name` of sglang_hma's `module`."""
    return lambda: pkgutil.resolve_name(f"sglang_hma.{module}:{name}")
