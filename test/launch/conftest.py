from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .fleet import Launch, Run, start


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """fleet.start with a folder of its own, everything killed afterwards."""
    runs: list[Run] = []

    def begin(*args: str, **options: Any) -> Run:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        runs.append(start(folder, args, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
