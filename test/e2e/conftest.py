"""Servers shared by the end-to-end tests. All run on CPU, fp32, with a random tiny model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from .harness import Pair, Server, launch, running, running_pair

CHUNK = 64
COMMON = ("--dtype", "float32", "--chunked-prefill-size", str(CHUNK), "--enable-metrics")
# Small enough that 200 concurrent requests reuse pages and retract.
POOL_TOKENS = 4096


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sglang_hma.demo_model import make_demo_model

    path = tmp_path_factory.mktemp("models") / "qwen3"
    make_demo_model(path)
    return path


@pytest.fixture(scope="session")
def pair(model: Path, logs: Path) -> Iterator[Pair]:
    """Prefill, decode and router with BFP8 pages; the decode pool is small."""
    with running_pair(
        model,
        logs,
        *COMMON,
        prefill_flags=("--max-total-tokens", "16384"),
        decode_flags=(
            *("--max-total-tokens", str(POOL_TOKENS), "--max-running-requests", "64"),
            *("--num-reserved-decode-tokens", "1"),
        ),
    ) as started:
        yield started


@pytest.fixture(scope="session")
def native(model: Path, logs: Path) -> Iterator[Pair]:
    """The same pair with all formats off."""
    flags = ("--hma-kv-format", "native", "--page-size", "16", "--max-total-tokens", "8192")
    with running_pair(model, logs, *COMMON, *flags, name="native") as started:
        yield started


@pytest.fixture(scope="session")
def single(model: Path, logs: Path) -> Iterator[Server]:
    """One server with the same formats, both roles."""
    server = launch("single", model, logs, *COMMON, "--max-total-tokens", "16384")
    with running(server):
        yield server


def flush(server: Server) -> None:
    requests.post(f"{server.url}/flush_cache", timeout=30).raise_for_status()
