"""Triton kernels: on a GPU where there is one, else under Triton's interpreter on small shapes."""

import os
import secrets
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
SEED = int(os.environ.get("HMA_TEST_SEED") or secrets.randbits(32))

# Triton reads TRITON_INTERPRET when it is imported, when a kernel is decorated and when it runs.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WITHOUT_GPU = ("test_compiles.py", "test_prebuilt.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU or INTERPRETED:
        return
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="no GPU: run with TRITON_INTERPRET=1, as make test does")
    for item in items:
        if item.path.is_relative_to(here) and item.path.name not in WITHOUT_GPU:
            item.add_marker(skip)


def pytest_report_header() -> str:
    return f"Triton kernels: {'interpreted' if INTERPRETED else 'GPU'}, HMA_TEST_SEED={SEED}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU and not INTERPRETED else "cpu")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    print(f"HMA_TEST_SEED={SEED}")
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])
