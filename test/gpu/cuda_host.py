"""The CUDA kernels compiled for threads on the host (test/cuda_on_host)."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from hma_kernels.cuda.build import SOURCES, Instance
from hma_kernels.cuda.library import DecodeLibrary

SHIM = Path(__file__).parent.parent / "cuda_on_host" / "include"
os.environ.setdefault("HMA_BLOCKS", "128")  # that the pretended GPU runs at a time
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas")
SANITIZE = ("-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan")


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="hma-cuda-on-host-"))


def compile_on_host(source: Path, *options: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    includes = ("-I", str(SHIM), "-I", str(SOURCES / "include"))
    subprocess.run([compiler, *FLAGS, *includes, *options, "-x", "c++", str(source)], check=True)


@functools.cache
def library(instance: Instance) -> DecodeLibrary:
    target = folder() / f"{instance.name}.so"
    options = (*SANITIZE, *instance.macros(), "-o", str(target))
    compile_on_host(SOURCES / "decode.cu", *options)
    return DecodeLibrary(target)


def eager_copies(eager: bool) -> None:
    """Copies are performed when they are asked for, or as late as they may be."""
    libc = ctypes.CDLL(None)
    libc.setenv(b"HMA_COPIES", b"eager" if eager else b"late", 1)
