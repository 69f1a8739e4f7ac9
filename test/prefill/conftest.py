"""The Tenstorrent runtime on a stand-in for ttnn (test/stand_ins/ttnn_on_torch)."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

STAND_IN = Path(__file__).parent.parent / "stand_ins" / "ttnn_on_torch"


def ttnn_modules() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "ttnn"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`import ttnn` gives the stand-in, as a process that has just started finds it."""
    for name in ttnn_modules():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("TT_METAL_SIMULATOR", "a stand-in")
    assert importlib.import_module("ttnn").__file__ == str(STAND_IN / "ttnn" / "__init__.py")
    yield
    for name in ttnn_modules():
        del sys.modules[name]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)
