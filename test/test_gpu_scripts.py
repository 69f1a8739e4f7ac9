"""What is carried to a bare CUDA machine arrives whole or not at all; its scripts end in words."""

import hashlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
# What gpu_check.sh needs of a system; no nvcc, ncu or compute-sanitizer among them.
TOOLS = ("bash", "cat", "dirname", "grep", "head", "mkdir", "mktemp", "realpath", "rm", "tail")
TOOLS += ("tar", "tee", "timeout", "gzip", "env")


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_wheels", SCRIPTS / "gpu_wheels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def make_wheel(folder: Path, distribution: str, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{distribution}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def carry(wheels: ModuleType, out: Path, groups: dict[str, list[tuple[Path, str]]]) -> list[Path]:
    """As gpu_wheels.py leaves them, in pieces of 1,000 bytes."""
    out.mkdir()
    pieces = [
        p for g, members in groups.items() for p in wheels.write_pieces(g, members, out, 1000)
    ]
    sums = [f"{hashlib.sha256(piece.read_bytes()).hexdigest()}  {piece.name}" for piece in pieces]
    (out / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    return pieces


def unpack(pieces: Path, into: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPTS / "gpu_unpack.py"), str(pieces), str(into), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr
    return done


def test_what_was_cut_is_put_together(
    wheels: ModuleType, rng: np.random.Generator, tmp_path: Path
) -> None:
    data = [rng.bytes(size) for size in (5000, 1, 12_345)]
    files = {"a/__init__.py": data[0], "a-1.0.data/purelib/b.py": data[1]}
    files["a-1.0.data/scripts/tool"] = b"not wanted"
    one = make_wheel(tmp_path, "a", files)
    other = make_wheel(tmp_path, "mooncake", {"mooncake/engine.so": data[2]})
    library = tmp_path / "libnuma.so.1"
    library.write_bytes(data[2])
    groups = {
        "servers": [(one, one.name), (library, "lib/libnuma.so.1")],
        "mooncake-cuda": [(other, f"cuda/{other.name}")],
    }
    pieces = carry(wheels, tmp_path / "pieces", groups)
    assert len(pieces) > 10 and all(piece.stat().st_size <= 1000 for piece in pieces)
    done = unpack(tmp_path / "pieces", tmp_path / "into")
    assert done.returncode == 0, done.stdout
    there = {
        p.relative_to(tmp_path / "into"): p.read_bytes() for p in (tmp_path / "into").rglob("*.*")
    }
    assert there == {
        Path("site/a/__init__.py"): data[0],
        Path("site/b.py"): data[1],
        Path("cuda/mooncake/engine.so"): data[2],
        Path("lib/libnuma.so.1"): data[2],
    }
    assert "servers: 1 wheels" in done.stdout


@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_a_group_with_a_bad_piece_is_left_out_whole(
    wheels: ModuleType, rng: np.random.Generator, tmp_path: Path, fault: str
) -> None:
    made = {
        name: make_wheel(tmp_path, name, {f"{name}.py": rng.bytes(3000)}) for name in ("a", "b")
    }
    groups = {
        "servers": [(made["a"], made["a"].name)],
        "kernel-checks": [(made["b"], made["b"].name)],
    }
    pieces = carry(wheels, tmp_path / "pieces", groups)
    bad = pieces[-1 - int(rng.integers(3))]
    data = bytearray(bad.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    bad.unlink() if fault == "missing" else bad.write_bytes(data)
    done = unpack(tmp_path / "pieces", tmp_path / "into")
    assert done.returncode == 1
    assert f"kernel-checks: left out: {bad.name} is {fault}" in done.stdout
    assert [path.name for path in (tmp_path / "into/site").iterdir()] == ["a.py"]
    assert unpack(tmp_path / "pieces", tmp_path / "again", "--groups", "servers").returncode == 0


def test_the_machines_torch_is_never_replaced(wheels: ModuleType, tmp_path: Path) -> None:
    for name in ("torch", "triton", "torch_memory_saver"):
        make_wheel(tmp_path / "pieces", name, {f"{name}/__init__.py": b""})
    done = unpack(tmp_path / "pieces", tmp_path / "into")
    assert [path.name for path in (tmp_path / "into/site").iterdir()] == ["torch_memory_saver"]
    assert done.stdout.count("the machine's own is used") == 2
    machine = wheels.versions_of(SCRIPTS / "gpu_machine.txt")
    for wanted in wheels.groups(machine).values():
        assert not wanted.keys() & {*machine, "torch", "triton", "nvidia-cublas"}


def test_each_pin_of_a_cpu_server_is_carried_or_there(wheels: ModuleType) -> None:
    machine = wheels.versions_of(SCRIPTS / "gpu_machine.txt")
    servers = wheels.groups(machine)["servers"]
    assert servers.pop("torchvision") == "torchvision==0.26.*"  # of torch 2.11
    cpu = wheels.pins("cpu")
    own = wheels.torchvision_for(cpu["torch"].partition("==")[2]).removesuffix("*")
    assert cpu.pop("torchvision").startswith(own)
    for name, pin in cpu.items():
        assert servers.get(name) == pin or name in machine or name in wheels.LEFT_OUT, name
    assert {"sglang", "sglang-router", "mooncake-transfer-engine-non-cuda"} <= servers.keys()
    assert wheels.PIECE_BYTES < 60_000_000


def test_sgl_kernel_is_carried_only_to_the_torch_that_it_is_made_for(wheels: ModuleType) -> None:
    pinned = wheels.pins("cuda")["torch"].removeprefix("torch==")
    assert wheels.other_torch(pinned) is None and wheels.other_torch(f"{pinned}+cu130") is None
    assert f"is made for torch {pinned}; the machine has 2.11.0" in wheels.other_torch("2.11.0")


@pytest.mark.parametrize("python", ["false", "true"])
def test_gpu_check_names_what_failed_and_says_so_by_its_exit_code(
    tmp_path: Path, python: str
) -> None:
    """Parts that a python3 which does nothing, or fails, makes short."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, tool
        (path / tool).symlink_to(found)
    env = os.environ | {"PYTHON": f"/bin/{python}", "PATH": str(path)}
    command = [str(SCRIPTS / "gpu_check.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == (1 if python == "false" else 0), done.stdout
    last = (tmp_path / "out/summary.txt").read_text().splitlines()[-1]
    expected = "tests peers decode model instructions memory" if python == "false" else "nothing"
    assert last.endswith(f"; failed: {expected}")
    assert (tmp_path / "out/logs.tar.gz").exists()


def test_gpu_pair_without_its_wheels_says_what_it_needs(tmp_path: Path) -> None:
    env = os.environ | {"PYTHON": "/bin/false"}
    command = [str(SCRIPTS / "gpu_pair.sh"), str(tmp_path / "out"), str(tmp_path / "nothing")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    summary = (tmp_path / "out/pair_summary.txt").read_text()
    assert "no pair: " in summary and "scripts/gpu_wheels.sh is needed" in summary
    assert "Traceback" not in done.stdout + done.stderr
