"""--hma-trace on a disk that fills up: the thread that sends pages also writes the trace."""

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.prefill import trace
from sglang_hma.transfer.prefill.trace import Trace


def forward(layers: int) -> LayerGate:
    """A forward pass that has ended."""
    gate = LayerGate(layers)
    for layer in range(layers):
        gate.advance(layer)
    gate.finish()
    return gate


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "FLUSH_S", 0.0)


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_trace_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trace.json"
    traced = Trace(path, "prefill")
    traced.forward(forward(2))
    traced.flush()
    whole = path.read_text()
    traced.forward(forward(2))
    with room_for(len(whole) + 50):
        traced.flush()
    assert path.read_text() == whole
    assert json.loads(whole.rstrip(",\n") + "]")
    traced.forward(forward(2))
    traced.flush(final=True)
    assert path.read_text() == whole
    assert caplog.text.count(f"--hma-trace {path}: File too large, so the trace ends here") == 1


def test_a_disk_that_takes_nothing_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trace.json"
    traced = Trace(path, "prefill")
    path.unlink()
    path.symlink_to("/dev/full")
    traced.flush()
    assert f"--hma-trace {path}: No space left on device" in caplog.text
