"""Shares of kernels in a trace."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmark.serving.gpu_trace import shares, wait


def written(folder: Path, *kernels: tuple[str, float, float]) -> Path:
    """(name, begin, microseconds), and what else is in such a file."""
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": at, "dur": lasts}
        for name, at, lasts in kernels
    ]
    events += [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1e6}, {"ph": "M"}]
    path = folder / "1-TP-0.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_shares_of_a_span(tmp_path: Path) -> None:
    trace = written(
        tmp_path,
        ("gemm", 1000, 30),
        ("hma_decode_kernel(hma::DecodeParams)", 1030, 20),
        ("hma_merge_2_kernel", 1045, 10),  # started before the other has ended
        ("gemm", 1080, 20),
    )
    found = shares(wait(tmp_path, 1))
    assert trace.exists() and found.span_s == pytest.approx(100e-6)
    assert found.busy == pytest.approx(0.75) and found.attention == pytest.approx(0.3)
    assert found.others == (("gemm", pytest.approx(0.5)),)
    assert "decode attention 30%" in str(found)


def test_a_trace_without_a_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no kernel of a GPU"):
        shares(written(tmp_path))


def test_an_unfinished_trace_is_waited_for(tmp_path: Path) -> None:
    whole = written(tmp_path, ("gemm", 0, 1))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(TimeoutError, match="no trace"):
        wait(tmp_path, 0.1)
