"""Kernels that were compiled with the wheel, for hosts without nvcc (`make cubins`).

A library's name says for which architecture it is and holds the digest of what it was compiled
from, so one of other sources is never taken.
"""

from pathlib import Path

from hma_kernels.cuda.build import SOURCES, Instance, digest, file_name

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def folder() -> Path:
    return SOURCES / "prebuilt"


def path_of(instance: Instance, architecture: int) -> Path:
    """Where `make cubins` puts it."""
    return folder() / file_name(instance, architecture, digest(instance, architecture))


def find(instance: Instance, major: int, minor: int) -> Path:
    """The library for a GPU of this compute capability: machine code for its own, else for the
    nearest lower minor one, which it runs too.

    Raises RuntimeError that says whether there is none or only one of other sources.
    """
    stale = False
    for architecture in range(10 * major + minor, 10 * major - 1, -1):
        path = path_of(instance, architecture)
        if path.exists():
            return path
        stale |= any(folder().glob(file_name(instance, architecture, "*")))
    if stale:
        raise RuntimeError(f"the prebuilt {instance.name} is of other sources")
    raise RuntimeError(f"no {instance.name} is prebuilt for compute capability {major}.{minor}")
