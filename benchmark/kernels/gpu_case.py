"""Random batches on a GPU, decode attention over them by our kernels, and how calls are timed."""

from collections.abc import Callable, Sequence

import torch

from hma_kernels import PAGE, TILE, TILE_BYTES, PagedKV, PageTable, bfp8_unpack
from hma_kernels.base import DecodeCall
from hma_kernels.cuda import decode as cuda_decode
from hma_kernels.triton import decode as triton_decode

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
ROTATED_BYTES = 1 << 28  # several times any L2 cache, so that each call reads from memory
MAX_LAYERS = 256
COPY_BYTES = 1 << 32
CALLS_A_GRAPH = 16
SECONDS_A_ROUND = 0.01
DEVICE = torch.device("cuda")

Run = Callable[[int], object]
"""Attention in one layer."""


class Case:
    """Requests of `lengths` tokens, all of their pages of one format and in random order."""

    def __init__(self, lengths: Sequence[int], *, bf16_pages: bool = False) -> None:
        self.batch, self.bf16_pages = len(lengths), bf16_pages
        counts = torch.tensor([-(-length // PAGE) for length in lengths])
        self.pages = int(counts.sum())
        size = 2 if bf16_pages else 17 / 16
        self.bytes = int(2 * self.pages * PAGE * KV_HEADS * DIM * size)
        self.layers = max(1, min(MAX_LAYERS, -(-ROTATED_BYTES // self.bytes)))
        empty8 = torch.empty(0, KV_HEADS, DIM // TILE, TILE_BYTES, dtype=torch.uint8, device=DEVICE)
        empty16 = torch.empty(0, KV_HEADS, PAGE, DIM, dtype=torch.bfloat16, device=DEVICE)

        def layers(make: Callable[[], torch.Tensor], empty: torch.Tensor, used: bool) -> list:
            return [make() if used else empty for _ in range(self.layers)]

        self.kv = PagedKV(
            *(layers(self._tiles, empty8, not bf16_pages) for _ in range(2)),
            *(layers(self._bf16, empty16, bf16_pages) for _ in range(2)),
        )
        self.indices = torch.randperm(self.pages, device=DEVICE)
        self.indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(DEVICE)
        pos = torch.cat([torch.arange(int(count)) for count in counts]).to(DEVICE) * PAGE
        used = (self.indptr, self.indices, pos)
        unused = (self.indptr * 0, self.indices[:0], pos[:0])
        self.lengths = torch.tensor(list(lengths), device=DEVICE)
        first, second = (unused, used) if bf16_pages else (used, unused)
        self.table = PageTable(*first, *second, seq_lens=self.lengths)
        self.q = torch.randn(self.batch, Q_HEADS, DIM, dtype=torch.bfloat16, device=DEVICE)
        self.out = torch.empty_like(self.q)

    def _tiles(self) -> torch.Tensor:
        shape = (self.pages, KV_HEADS, DIM // TILE, TILE_BYTES)
        tiles = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
        tiles[..., :64] = tiles[..., :64] % 7 + 120
        return tiles

    def _bf16(self) -> torch.Tensor:
        shape = (self.pages, KV_HEADS, PAGE, DIM)
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)

    def cuda(self) -> Run | None:
        library = cuda_decode.library_for(self.kv, Q_HEADS, self.q.dtype)
        if library is None:
            return None
        plan = cuda_decode.DecodePlan(self.kv, self.table, Q_HEADS, -1, library)
        return lambda layer: plan.run(DecodeCall(self.q, layer, SCALE, 0.0, self.out))

    def triton(self) -> Run:
        plan = triton_decode.DecodePlan(self.kv, self.table, Q_HEADS, -1)
        return lambda layer: plan.run(DecodeCall(self.q, layer, SCALE, 0.0, self.out))

    def plain(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The same K and V as pages of `dtype` [layers, pages, heads, 32, dim]."""
        shape = (self.layers, self.pages, KV_HEADS, PAGE, DIM)
        k, v = (torch.empty(shape, dtype=dtype, device=DEVICE) for _ in range(2))
        for pages, tiles, plain in (
            (k, self.kv.k_bfp8, self.kv.k_bf16),
            (v, self.kv.v_bfp8, self.kv.v_bf16),
        ):
            for layer in range(self.layers):
                values = plain[layer] if self.bf16_pages else bfp8_unpack(tiles[layer][:, :, None])
                pages[layer] = values.view(shape[1:]).to(dtype)
        return k, v

    def unpack_then(self, attend: Run, k: torch.Tensor, v: torch.Tensor) -> Run:
        """Every page unpacked to BF16, then a kernel that reads those."""

        def run(layer: int) -> None:
            for pages, tiles in ((k, self.kv.k_bfp8), (v, self.kv.v_bfp8)):
                target = pages[layer].view(self.pages, KV_HEADS, 1, PAGE, DIM).flatten(2, 3)
                bfp8_unpack(tiles[layer][:, :, None], out=target)
            attend(layer)

        return run


def captured(run: Run, layers: int) -> Callable[[], float]:
    """Seconds a call between two events of the GPU: a CUDA graph of calls over the layers in turn,
    replayed until a round is full, so that no Python runs in between."""
    for layer in range(min(layers, 3)):
        run(layer)
    torch.cuda.synchronize()
    calls = max(layers, CALLS_A_GRAPH)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            run(call % layers)
    # The graph's calls read what `run` holds, so it must live as long.
    return _timed(lambda of=run: graph.replay(), calls)


def _timed(enqueue: Callable[[], object], calls: int) -> Callable[[], float]:
    """Seconds of one of the `calls` that `enqueue` makes."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(times: int) -> float:
        begin.record()
        for _ in range(times):
            enqueue()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / times / calls

    measure(1)
    times = max(1, round(SECONDS_A_ROUND / measure(1) / calls))
    return lambda: measure(times)


def copied() -> Callable[[], float]:
    """Seconds a byte, read or written, of a device copy. Not captured: a graph gives copies to the
    copy engine, which is slower."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    once = _timed(lambda: target.copy_(source), 1)
    return lambda: once() / COPY_BYTES
