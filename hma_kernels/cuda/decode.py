"""Decode attention in CUDA C++: two kernels a layer, and one a step that divides the batch."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hma_kernels.base import DecodeCall
from hma_kernels.cuda import prebuilt, probe
from hma_kernels.cuda.build import HEADS_PER_TILE, Instance, build
from hma_kernels.cuda.library import DecodeLibrary, DecodeParams, PagedKVParams
from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton.visible import VisiblePages

logger = logging.getLogger(__name__)

QUERIES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
MAX_DIM = 256
ALIGNMENT = 16  # bytes of one copy to shared memory


class DecodePlan:
    """hma_kernels.DecodePlan on an NVIDIA GPU.

    blocks: what the batch is divided into; as many as the GPU runs at a time unless given.
    """

    def __init__(
        self,
        kv: PagedKV,
        table: PageTable,
        heads: int,
        sliding_window: int,
        library: DecodeLibrary,
        blocks: int | None = None,
    ) -> None:
        self._kv = kv
        with _on(kv.device):
            self._visible = VisiblePages(table, sliding_window)
        self._table = self._visible.table
        self._gqa_group_size = heads // kv.kv_heads
        self._sliding_window = sliding_window
        self._library = library
        with _on(kv.device):
            resident = library.blocks()
        self._blocks = min(resident, blocks or resident)
        self._workspace = torch.empty(0, dtype=torch.uint8, device=kv.device)
        size = library.workspace_bytes(self._params())
        self._workspace = torch.empty(size, dtype=torch.uint8, device=kv.device)
        self._schedule()

    def refresh(self) -> None:
        with _on(self._kv.device):
            self._visible.update()
        self._schedule()

    def _schedule(self) -> None:
        if self._table.batch_size:
            with _on(self._kv.device) as stream:
                self._library.schedule(self._params(), stream)

    def run(self, call: DecodeCall) -> None:
        if not self._table.batch_size:
            return
        q, out = call.q, call.out
        q = q if q.stride(2) == 1 else q.contiguous()
        suits = out.dtype == q.dtype and out.is_contiguous()
        own = out if suits else q.new_empty(out.shape)
        if q is not call.q or own is not out:
            call = replace(call, q=q, out=own)
        with _on(q.device) as stream:
            self._library.decode(self._params(call), stream)
        if own is not out:
            out.copy_(own)

    def _params(self, call: DecodeCall | None = None) -> DecodeParams:
        """The schedule needs no queries and no output."""
        kv, table = self._kv, self._table
        query: tuple[int | None, int, int] = (None, 0, 0)
        layer, scale, logit_cap, out, sinks = 0, 1.0, 0.0, None, None
        if call is not None:
            query = call.q.data_ptr(), call.q.stride(0), call.q.stride(1)
            layer, scale, logit_cap = call.layer, call.scale, call.logit_cap
            out, sinks = call.out, call.sinks

        def paged_kv(k: torch.Tensor, v: torch.Tensor, *table: torch.Tensor) -> PagedKVParams:
            strides = (x.stride(0) * x.element_size() for x in (k, v))
            return PagedKVParams(
                k.data_ptr(), v.data_ptr(), *strides, *(entries.data_ptr() for entries in table)
            )

        return DecodeParams(
            *query,
            paged_kv(
                *(kv.k_bfp8[layer], kv.v_bfp8[layer]),
                *(table.bfp8_indptr, table.bfp8_indices, table.bfp8_pos),
            ),
            paged_kv(
                *(kv.k_bf16[layer], kv.v_bf16[layer]),
                *(table.bf16_indptr, table.bf16_indices, table.bf16_pos),
            ),
            table.seq_lens.data_ptr(),
            None if out is None else out.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            self._workspace.data_ptr(),
            *(table.batch_size, kv.kv_heads, self._gqa_group_size, self._sliding_window),
            *(scale, logit_cap, self._blocks),
        )


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[int]:
    """The device's current stream."""
    if device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def instance_for(
    head_dim: int, v_head_dim: int, gqa_group_size: int, dtype: torch.dtype, *, stages: int
) -> Instance:
    """Two tiles of query heads a block only where the registers hold both."""
    largest = 128 if dtype == torch.bfloat16 else 64  # float16 queries take twice as many
    tiles = 2 if gqa_group_size > HEADS_PER_TILE and max(head_dim, v_head_dim) <= largest else 1
    return Instance(QUERIES[dtype], head_dim, v_head_dim, tiles, stages)


def stages_on(major: int) -> int:
    """As many as leave room for a second block in a multiprocessor's shared memory."""
    return 3 if major in (9, 10) else 2


def library_for(kv: PagedKV, heads: int, dtype: torch.dtype) -> DecodeLibrary | None:
    """The kernel for these heads on this device, or None, with a line in the log, where only the
    Triton kernel works.

    It is returned only if it has solved a small problem on the device as torch does in float64.
    """
    pages = [*kv.k_bfp8, *kv.v_bfp8, *kv.k_bf16, *kv.v_bf16]
    aligned = all(
        x.data_ptr() % ALIGNMENT == 0 and x.stride(0) * x.element_size() % ALIGNMENT == 0
        for x in pages
    )
    gqa_group_size = heads // kv.kv_heads
    return _library(kv.device, kv.head_dim, kv.v_head_dim, gqa_group_size, dtype, aligned)


@functools.cache
def _library(
    device: torch.device,
    head_dim: int,
    v_head_dim: int,
    gqa_group_size: int,
    dtype: torch.dtype,
    aligned: bool,
) -> DecodeLibrary | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    try:
        if major < 8:
            raise RuntimeError(f"its compute capability is {major}.{minor}; needs 8.0")
        if max(head_dim, v_head_dim) > MAX_DIM:
            raise RuntimeError(f"head dims {head_dim} and {v_head_dim}; at most {MAX_DIM}")
        if not aligned:
            raise RuntimeError(f"pages are not aligned to {ALIGNMENT} bytes")
        instance = instance_for(
            head_dim, v_head_dim, gqa_group_size, dtype, stages=stages_on(major)
        )
    except RuntimeError as error:
        _say_triton(device, str(error))
        return None

    def works(path: Path) -> DecodeLibrary:
        library = DecodeLibrary(path)
        probe.check(
            lambda kv, table, heads: DecodePlan(kv, table, heads, -1, library),
            *(head_dim, v_head_dim, gqa_group_size, dtype, device),
        )
        return library

    return first_that_works(instance, major, minor, device, works)


def first_that_works(
    instance: Instance,
    major: int,
    minor: int,
    device: torch.device,
    works: Callable[[Path], DecodeLibrary],
) -> DecodeLibrary | None:
    """What `works` makes of the prebuilt library, else of what nvcc compiles here, else None.

    One line in the log says which it is, and why not those before it. `works` raises RuntimeError
    or OSError for a library that does not.
    """
    origins: dict[str, Callable[[], Path]] = {
        "prebuilt": lambda: prebuilt.find(instance, major, minor),
        "compiled here": lambda: build(instance, 10 * major + minor),
    }
    refused = []
    for origin, path_of in origins.items():
        try:
            path = path_of()
            library = works(path)
        except (RuntimeError, OSError) as error:
            refused.append(f"not {origin}: {error}")
        else:
            reasons = "; ".join([f"{path.name}, {origin}", *refused])
            logger.info("Decode attention in CUDA C++ on %s: %s", device, reasons)
            return library
    _say_triton(device, "; ".join(refused))
    return None


def _say_triton(device: torch.device, reason: str) -> None:
    logger.warning("Decode attention in Triton, not CUDA C++, on %s: %s", device, reason)
