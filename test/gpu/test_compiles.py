"""Every kernel compiles to machine code for the GPUs that it is meant for, without one."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from cuda_host import compile_on_host

from hma_kernels import layout
from hma_kernels.cuda import build
from hma_kernels.cuda.library import DecodeParams, PagedKVParams

SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["90"])
def test_kernels_compile(architecture: str, tmp_path: Path) -> None:
    # In a process of its own: here kernels may be interpreted.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), architecture], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    lines = done.stdout.splitlines()
    assert sum(line.startswith(f"sm_{architecture} ") for line in lines) == 18
    decode = [line for line in lines if " decode(" in line]
    assert len(decode) == 4 and all(" 0 bytes spilled" in line for line in decode)


@pytest.mark.slow
@pytest.mark.skipif(
    not triton.__version__.startswith("3.8."), reason="the bar is for the Triton of requirements/"
)
def test_a_page_takes_no_more_instructions_than_it_may(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="benchmarks print their tables with rich")
    # In a process of its own: here kernels may be interpreted.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmark.kernels.sass_triton", "--architectures", "90"]
    done = subprocess.run(
        [*command, "--check", "--json", str(report)], capture_output=True, text=True, env=env
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = json.loads(report.read_text())["results"].values()
    # What no compiler can do without: 8192 bytes, two of a lane's in each permutation.
    assert found["names"]["PRMT"] >= 128 and found["names"]["HMMA"] == 32


@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc in CUDA_HOME, PATH or wheels")
@pytest.mark.parametrize(
    ("architecture", "query", "dims", "tiles", "stages"),
    [
        (90, "__nv_bfloat16", (128, 128), 1, 3),
        (80, "__nv_bfloat16", (128, 128), 2, 2),
        (89, "__nv_bfloat16", (128, 128), 1, 2),
        (100, "__nv_bfloat16", (128, 128), 1, 3),
        (120, "__nv_bfloat16", (128, 128), 1, 2),
        (90, "__half", (64, 64), 2, 3),
        (90, "__half", (128, 128), 1, 3),
        (80, "__nv_bfloat16", (256, 256), 1, 2),
    ],
)
def test_cuda_compiles(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    architecture: int,
    query: str,
    dims: tuple[int, int],
    tiles: int,
    stages: int,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *build.NO_SPILLS))
    instance = build.Instance(query, *dims, tiles, stages)
    path = build.build(instance, architecture)
    made = path.stat().st_mtime_ns
    assert build.build(instance, architecture) == path
    assert path.stat().st_mtime_ns == made  # once


def test_cuda_constants_and_structs_are_those_of_python(tmp_path: Path) -> None:
    names = ("TILE", "GROUP", "FACE", "PAGE", "EXPONENT_BYTES", "TILE_BYTES")
    claims = [f"hma::{name} == {getattr(layout, name)}" for name in names]
    claims.append(f"hma::HEADS_PER_TILE == {build.HEADS_PER_TILE}")
    for struct in (PagedKVParams, DecodeParams):
        full_name = f"hma::{struct.__name__}"
        claims.append(f"sizeof({full_name}) == {ctypes.sizeof(struct)}")
        for name, _ in struct._fields_:
            offset = getattr(struct, name).offset
            claims.append(f"offsetof({full_name}, {name}) == {offset}")
    source = tmp_path / "claims.cpp"
    lines = ["#include <hma/attention.cuh>", "#include <cstddef>"]
    source.write_text("\n".join([*lines, *(f"static_assert({claim});" for claim in claims), ""]))
    compile_on_host(source, "-fsyntax-only")
