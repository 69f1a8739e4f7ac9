"""How the CUDA kernel divides a batch among its warps, by its own code (schedule.cuh), compiled for
the host: the model of the kernel and its tests read the same division that a GPU works by."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hma_kernels.cuda.build import SOURCES, Instance
from hma_kernels.cuda.library import DecodeParams, PagedKVParams
from hma_kernels.layout import PAGE

ON_HOST = Path(__file__).parents[2] / "test" / "cuda_on_host" / "include"
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas")

# A warp's part of a unit (one request, one KV head, some of its query heads): Segment of
# schedule.cuh, and whose it is.
ROW = np.dtype(
    [
        (name, np.int32)
        for name in (
            *("warp", "tiles", "request", "kv_head", "first_head", "begin", "end", "bfp8_tiles"),
            *("bfp8_entry", "bf16_entry", "bf16_half", "partial", "unused"),
        )
    ]
)


class Divider:
    """schedule.cuh for one instance of the kernel.

    shared_bytes: shared memory of a block. Raises RuntimeError if its structs are not ROW's.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._library = ctypes.CDLL(str(_compile(instance)))
        if self._library.hma_row_bytes() != ROW.itemsize:
            raise RuntimeError(f"a Segment is not what {__name__}.ROW says")
        self._library.hma_workspace_bytes.restype = ctypes.c_int64
        self._library.hma_rows.restype = ctypes.c_int64
        self.shared_bytes = int(self._library.hma_shared_bytes())

    def rows(self, params: DecodeParams, workspace: torch.Tensor) -> np.ndarray:
        """What a schedule has left in a workspace on the host: ROW [n], warp by warp."""
        params.workspace = workspace.data_ptr()
        units = params.batch_size * params.kv_heads * params.gqa_group_size
        rows = np.zeros(params.blocks * self.instance.warps + units, ROW)
        count = self._library.hma_rows(ctypes.byref(params), rows.ctypes.data_as(ctypes.c_void_p))
        return rows[:count]

    def divide(
        self,
        lengths: Sequence[int],
        *,
        kv_heads: int,
        gqa_group_size: int,
        blocks: int,
        bf16_pages: bool = False,
    ) -> np.ndarray:
        """ROW [n] of requests of `lengths` tokens whose pages are all of one format."""
        pages = torch.tensor([0, *(-(-length // PAGE) for length in lengths)])
        indptr, none = pages.cumsum(0), torch.zeros_like(pages)
        seq_lens = torch.tensor(list(lengths))

        def table(indptr: torch.Tensor) -> PagedKVParams:
            return PagedKVParams(None, None, 0, 0, indptr.data_ptr(), None, None)

        formats = (none, indptr) if bf16_pages else (indptr, none)
        params = DecodeParams(
            *(None, 0, 0, *map(table, formats), seq_lens.data_ptr(), None, None, None),
            *(len(lengths), kv_heads, gqa_group_size, -1, 1.0, 0.0, blocks),
        )
        size = self._library.hma_workspace_bytes(ctypes.byref(params))
        workspace = torch.zeros(size, dtype=torch.uint8)
        params.workspace = workspace.data_ptr()
        self._library.hma_divide(ctypes.byref(params))
        return self.rows(params, workspace)


@functools.cache
def divider(instance: Instance) -> Divider:
    return Divider(instance)


def _compile(instance: Instance) -> Path:
    target = Path(tempfile.mkdtemp(prefix="hma-division-")) / f"{instance.name}.so"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    includes = ("-I", str(ON_HOST), "-I", str(SOURCES / "include"))
    source = Path(__file__).with_suffix(".cpp")
    command = [compiler, *FLAGS, *includes, *instance.macros(), "-o", str(target), str(source)]
    subprocess.run(command, check=True)
    return target
