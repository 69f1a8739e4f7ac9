"""SGLang's class of the model that is served, from the one module of sglang.srt.models with it."""

import importlib
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglang_hma.config import ARCHITECTURES_ENV

MODELS = "sglang.srt.models"
ENTRY = re.compile(r"^EntryClass\b[^=\n]*=\s*(\[[^\]]*\]|\w+)", re.MULTILINE)


def modules_of(architectures: set[str]) -> Iterator[str]:
    """Modules of sglang.srt.models whose EntryClass names one of `architectures`."""
    spec = find_spec(MODELS)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.py")):
            entry = ENTRY.search(path.read_text(encoding="utf-8"))
            if entry and architectures & set(re.findall(r"\w+", entry[1])):
                yield f"{MODELS}.{path.stem}"


def classes_of(architectures: set[str]) -> list[Any]:
    found: dict[str, Any] = {}
    for name in modules_of(architectures):
        entry = importlib.import_module(name).EntryClass
        found |= {
            model.__name__: model for model in (entry if isinstance(entry, list) else [entry])
        }
    return list(found.values())


EntryClass = classes_of(set(os.environ.get(ARCHITECTURES_ENV, "").split(",")))
