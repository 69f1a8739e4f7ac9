"""A folder for what the processes of one run of launch_pd share in files, which goes when they do.

The launcher makes it; the guardian removes it, so that a launcher that is killed leaves nothing
either. Its name is known from the run's id. Standard library only.
"""

import shutil
import tempfile
from pathlib import Path


def path(run_id: str) -> Path:
    return Path(tempfile.gettempdir()) / f"sglang-hma-{run_id}"


def make(run_id: str) -> Path:
    """A new folder that nobody else can look into. Raises OSError."""
    folder = path(run_id)
    folder.mkdir(mode=0o700)
    return folder


def remove(run_id: str) -> None:
    shutil.rmtree(path(run_id), ignore_errors=True)
