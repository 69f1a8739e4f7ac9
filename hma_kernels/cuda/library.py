"""A compiled decode kernel behind its C interface."""

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path


class PagedKVParams(ctypes.Structure):
    """PagedKVParams of include/hma/params.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("k", "v")),
        *((name, c_int64) for name in ("k_page_bytes", "v_page_bytes")),
        *((name, c_void_p) for name in ("indptr", "indices", "pos")),
    ]


class DecodeParams(ctypes.Structure):
    """DecodeParams of include/hma/params.h."""

    _fields_ = [
        ("query", c_void_p),
        *((name, c_int64) for name in ("query_stride", "query_head_stride")),
        *((name, PagedKVParams) for name in ("bfp8", "bf16")),
        *((name, c_void_p) for name in ("seq_lens", "out", "sinks", "workspace")),
        *((name, c_int32) for name in ("batch_size", "kv_heads")),
        *((name, c_int32) for name in ("gqa_group_size", "sliding_window")),
        *((name, c_float) for name in ("scale", "logit_cap")),
        ("blocks", c_int32),
    ]


class DecodeLibrary:
    """Raises OSError if the file is no library, RuntimeError if its DecodeParams are others."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.hma_params_bytes.restype = c_int
        if library.hma_params_bytes() != ctypes.sizeof(DecodeParams):
            raise RuntimeError(f"{path} was built from other sources")
        self._decode = library.hma_decode
        self._decode.argtypes = [ctypes.POINTER(DecodeParams), c_void_p]
        self._decode.restype = c_char_p
        self._blocks = library.hma_blocks
        self._blocks.argtypes = [ctypes.POINTER(c_int)]
        self._blocks.restype = c_char_p
        self._workspace_bytes = library.hma_workspace_bytes
        self._workspace_bytes.argtypes = [ctypes.POINTER(DecodeParams)]
        self._workspace_bytes.restype = c_int64
        self._schedule = library.hma_schedule
        self._schedule.argtypes = [ctypes.POINTER(DecodeParams), c_void_p]
        self._schedule.restype = c_char_p

    def blocks(self) -> int:
        """How many the current device runs at a time. Raises RuntimeError with CUDA's message."""
        found = c_int(0)
        if (failure := self._blocks(ctypes.byref(found))) is not None:
            raise RuntimeError(f"the decode kernel does not fit this GPU: {failure.decode()}")
        return found.value

    def workspace_bytes(self, params: DecodeParams) -> int:
        """Of DecodeParams.workspace, for these batch and block sizes."""
        return int(self._workspace_bytes(ctypes.byref(params)))

    def schedule(self, params: DecodeParams, stream: int) -> None:
        """Enqueue the division of the batch, which decode() works by until the next one.

        Raises RuntimeError with CUDA's message if it cannot start.
        """
        if (failure := self._schedule(ctypes.byref(params), stream)) is not None:
            raise RuntimeError(f"the schedule kernel did not start: {failure.decode()}")

    def decode(self, params: DecodeParams, stream: int) -> None:
        """Enqueue the kernels, after blocks() was asked on this device.

        Raises RuntimeError with CUDA's message if it cannot start.
        """
        if (failure := self._decode(ctypes.byref(params), stream)) is not None:
            raise RuntimeError(f"the decode kernel did not start: {failure.decode()}")
