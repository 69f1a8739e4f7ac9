"""Fresh random data for every run, and what it means that results agree.

The run's seed stands in pytest's header; HMA_TEST_SEED=<seed> repeats a run.
"""

import importlib.util
import os
import secrets
import sys
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from kernel_cases import GOLDEN, Cache, Spec, random_cache, widen

import hma_kernels.portable
from hma_kernels import implementation

if extension := os.environ.get("HMA_TEST_EXTENSION"):
    # Another build of the C++ kernels than the installed one: scripts/sanitize.sh.
    spec = importlib.util.spec_from_file_location("hma_kernels.cpu._ext", extension)
    assert spec and spec.loader
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

SEED = int(os.environ.get("HMA_TEST_SEED") or secrets.randbits(32))


def pytest_report_header() -> str:
    return f"kernel tests: HMA_TEST_SEED={SEED}"


ISAS = ["scalar", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture(scope="module", autouse=True, params=["portable", *ISAS])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of this folder runs on each implementation that this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "portable":
            patch.setattr(implementation, "_host", lambda: hma_kernels.portable)
            yield request.param
            return
        try:
            from hma_kernels import cpu
        except ImportError:
            pytest.skip("hma_kernels.cpu was not built: no C++ compiler")
        if request.param not in cpu.available_isas():
            pytest.skip(f"this machine has no {request.param}")
        patch.setattr(implementation, "_host", lambda: cpu)
        before = cpu.isa()
        cpu.set_isa(request.param)
        yield request.param
        cpu.set_isa(before)


@pytest.fixture(autouse=True)
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    print(f"HMA_TEST_SEED={SEED}")
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="session")
def golden() -> Callable[[str], np.ndarray]:
    """Loads golden/<name>.npy; *.in of a bf16 set comes as the float32 of its bit patterns."""

    def load(name: str) -> np.ndarray:
        array = np.load(GOLDEN / f"{name}.npy")
        is_bits = array.dtype == np.uint16 and name.endswith(".in")
        return widen(array) if is_bits else array

    return load


@pytest.fixture
def make_cache(rng: np.random.Generator) -> Callable[[Spec], Cache]:
    return lambda spec: random_cache(rng, spec)


@pytest.fixture(scope="session")
def assert_near() -> Callable[[torch.Tensor, np.ndarray, float], None]:
    """Half a unit in the last place of got's dtype, plus noise relative to each head's largest."""

    def check(got: torch.Tensor, expected: np.ndarray, noise: float) -> None:
        rounding = torch.finfo(got.dtype).eps / 2 * np.abs(expected)
        allowed = rounding + noise * np.abs(expected).max(-1, keepdims=True)
        error = np.abs(got.double().numpy() - expected)
        assert np.isfinite(error).all()
        assert (error <= allowed).all(), f"error / allowed is {np.max(error / allowed)}"

    return check


@pytest.fixture(scope="session")
def assert_same_float32() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Equal but for float64 noise that may turn the last bit of one value in a thousand."""

    def check(got: torch.Tensor, expected: torch.Tensor) -> None:
        assert got.dtype == expected.dtype == torch.float32
        differs = got != expected
        assert differs.double().mean() < 1e-3
        step = torch.nextafter(expected, got)[differs]
        assert torch.equal(got[differs], step)

    return check
