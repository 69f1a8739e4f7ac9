"""Triton kernels: on a GPU where there is one, else under Triton's interpreter on small shapes."""

import os
import secrets
import zlib

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
SEED = int(os.environ.get("HMA_TEST_SEED") or secrets.randbits(32))

if not ON_GPU:
    # Triton reads it when a kernel is decorated.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        import hma_kernels.triton
        import hma_kernels.triton.xxh3  # noqa: F401


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """And while it runs; but servers that other tests start must not see it."""
    if not ON_GPU:
        monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    return f"Triton kernels: {'GPU' if ON_GPU else 'interpreted'}, HMA_TEST_SEED={SEED}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    print(f"HMA_TEST_SEED={SEED}")
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])
