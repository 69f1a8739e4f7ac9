"""Compiles the decode kernel with nvcc when a shape is first needed, and keeps the library on disk.
prebuilt.py finds what was compiled in advance.

As FlashInfer does, but behind a C interface: no header of torch is compiled, so it takes seconds
and the library depends on no version but the compiler's.
"""

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
HEADS_PER_TILE = 8  # of include/hma/attention.cuh
FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-cudart",
    "static",
    "-Xcompiler",
    "-fPIC",
    "-Xlinker",
    "-s",
)
# Registers that do not suffice are an error.
NO_SPILLS = ("-Xptxas", "-warn-spills,-Werror")


@dataclass(frozen=True)
class Instance:
    """What the kernel is compiled for. query: "__nv_bfloat16" or "__half"."""

    query: str
    head_dim: int
    v_head_dim: int
    head_tiles: int  # tiles of 8 query heads in one block
    stages: int  # tiles of pages that a warp fetches ahead
    warps: int = 4

    @property
    def name(self) -> str:
        query = self.query.strip("_").removeprefix("nv_")
        dims = f"{self.head_dim}_{self.v_head_dim}"
        return f"decode_{query}_{dims}_{self.head_tiles}x{self.warps}x{self.stages}"

    def macros(self) -> list[str]:
        return [f"-DHMA_{name.upper()}={value}" for name, value in vars(self).items()]


def find_nvcc() -> str | None:
    """The first of: CUDA_HOME's, PATH's, that of NVIDIA's wheels."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    candidates = [
        *([str(Path(home, "bin", "nvcc"))] if home else []),
        "nvcc",
        *(str(path) for path in sorted(wheels.glob("cu*/bin/nvcc"), reverse=True)),
    ]
    return next(filter(None, map(shutil.which, candidates)), None)


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hma_kernels"


def command(nvcc: str, instance: Instance, architecture: int, target: Path) -> list[str]:
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    return [
        *(nvcc, *FLAGS, "-gencode", code, "-I", str(SOURCES / "include"), *instance.macros()),
        *(f"-DHMA_ARCHITECTURE={architecture}", str(SOURCES / "decode.cu"), "-o", str(target)),
    ]


def digest(instance: Instance, architecture: int) -> str:
    """Of all that the compiler is given, but not of the compiler: sources, flags, macros."""
    files = sorted([*SOURCES.glob("include/**/*.*h"), SOURCES / "decode.cu"])
    options = command("nvcc", instance, architecture, Path("library"))
    said = (option.replace(str(SOURCES), "") for option in options)
    parts = [*(path.read_bytes() for path in files), *map(str.encode, said)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def file_name(instance: Instance, architecture: int, key: str) -> str:
    return f"{instance.name}_sm{architecture}_{key}.so"


def build(instance: Instance, architecture: int) -> Path:
    """The library's path; compiled unless these sources and this compiler have made it before.

    Raises RuntimeError with the compiler's message if it fails, or if there is no compiler, and
    OSError if the cache cannot be written.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc in CUDA_HOME, PATH or NVIDIA's wheels")
    key = _with_version(digest(instance, architecture), nvcc)
    target = cache_folder() / file_name(instance, architecture, key)
    if not target.exists():
        logger.info("Compiling %s for sm_%d, once", instance.name, architecture)
        compile_into(target, nvcc, instance, architecture)
    return target


def compile_into(
    target: Path, nvcc: str, instance: Instance, architecture: int, *options: str
) -> None:
    """options: nvcc's, that do not change what is made. Of several processes that do it, the last
    one replaces an equal file. Raises RuntimeError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        done = subprocess.run(
            [*command(nvcc, instance, architecture, made), *options], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{nvcc} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
        os.replace(made, target)


def _with_version(key: str, nvcc: str) -> str:
    return hashlib.sha256(key.encode() + _version(nvcc)).hexdigest()[:16]


@functools.cache
def _version(nvcc: str) -> bytes:
    return subprocess.run([nvcc, "--version"], capture_output=True).stdout
