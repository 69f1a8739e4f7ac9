import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .fleet import Launch, Run, start


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """SGLang's prepare_server_args replaces the root logger's handlers."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """launch_pd's default log folder is not the user's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


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
