"""The Tenstorrent runtime on a stand-in for ttnn (test/data/ttnn_on_torch)."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

STAND_IN = Path(__file__).parent.parent / "data" / "ttnn_on_torch" / "ttnn.py"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import ttnn` gives the stand-in."""
    spec = importlib.util.spec_from_file_location("ttnn", STAND_IN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "ttnn", module)
    monkeypatch.setenv("TT_METAL_SIMULATOR", "a stand-in")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)
