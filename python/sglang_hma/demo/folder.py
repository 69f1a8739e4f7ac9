"""A model's folder appears whole or not at all, and says what it was made from."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPEC_FILE = "demo_model.json"


class DemoModelError(ValueError):
    """In words for the user."""


def write_model(
    path: str | os.PathLike[str], spec: dict[str, Any], write: Callable[[Path], None]
) -> Path:
    """The folder with what `write` puts there; nothing is done if it was made from `spec` already.

    A demo model made from something else is replaced. Raises DemoModelError for a folder that
    holds anything else.
    """
    target = Path(path).absolute()
    if existing_spec(target) == spec:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    draft.mkdir()
    try:
        write(draft)
        for file in draft.glob("*.safetensors"):  # safetensors makes them private to the user
            shutil.copymode(draft / "config.json", file)
        (draft / SPEC_FILE).write_text(json.dumps(spec, indent=2) + "\n")
        remove(target)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def existing_spec(target: Path) -> object:
    """What the demo model in `target` was made from; None if nothing is there."""
    if not target.exists():
        return None
    if not target.is_dir():
        raise DemoModelError(f"{target} is not a folder")
    if (target / SPEC_FILE).is_file():
        return json.loads((target / SPEC_FILE).read_text())
    if any(target.iterdir()):
        raise DemoModelError(
            f"{target} is not empty and holds no demo model; choose another folder"
        )
    return None


def link_model(path: str | os.PathLike[str], model: Path) -> Path:
    """`path` becomes a link to the folder `model`. Raises as write_model does."""
    link = Path(path).absolute()
    if link.resolve() != model.resolve():
        existing_spec(link)
        link.parent.mkdir(parents=True, exist_ok=True)
        remove(link)
        link.symlink_to(model)
    return link


def remove(target: Path) -> None:
    """A demo model, or a link to one, which stays."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
