"""Decode attention on a GPU: BFP8 pages read as they lie, beside FlashInfer and eager unpacking.

Ours reads pages in random order, in CUDA C++ and in Triton. Peers: FlashInfer's paged decode over
the same tokens in BF16 and in FP8 (which loses what BFP8 keeps), and unpacking all pages to BF16
before FlashInfer reads them. The floor is a kernel's bytes over the bandwidth of a device copy,
measured in the same rounds. Layers are read in turn, more of them than the L2 cache holds.
"""

import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmark.common import Figure, console, finish, interleave, parser, table
from hma_kernels import PAGE, TILE, TILE_BYTES, PagedKV, PageTable, bfp8_unpack, portable
from hma_kernels.cuda import decode as cuda_decode
from hma_kernels.triton import decode as triton_decode

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
MAIN, LONG = (64, 8192), (1, 32768)
SWEEP = [(batch, 8192) for batch in (1, 4, 16, 64, 128)]
SWEEP += [(batch, context) for context in (512, 2048, 32768) for batch in (1, 16)]
ROTATED_BYTES = 1 << 29  # several times any L2 cache
COPY_BYTES = 1 << 31
SECONDS_A_ROUND = 0.02
DEVICE = torch.device("cuda")

Run = Callable[[int], object]


class Case:
    """`batch` requests of `context` tokens over `layers` layers, all pages of one format."""

    def __init__(self, batch: int, context: int, *, bf16_pages: bool = False) -> None:
        self.batch, self.context = batch, context
        self.pages = batch * context // PAGE
        size = 2 if bf16_pages else 17 / 16
        self.bytes = int(2 * batch * context * KV_HEADS * DIM * size)
        self.layers = max(1, min(16, -(-ROTATED_BYTES // self.bytes)))
        empty8 = torch.empty(0, KV_HEADS, DIM // TILE, TILE_BYTES, dtype=torch.uint8, device=DEVICE)
        empty16 = torch.empty(0, KV_HEADS, PAGE, DIM, dtype=torch.bfloat16, device=DEVICE)
        formats = [
            [self._bf16() if bf16_pages else empty16 for _ in range(self.layers)],
            [self._bf16() if bf16_pages else empty16 for _ in range(self.layers)],
            [empty8 if bf16_pages else self._tiles() for _ in range(self.layers)],
            [empty8 if bf16_pages else self._tiles() for _ in range(self.layers)],
        ]
        self.kv = PagedKV(formats[2], formats[3], formats[0], formats[1])
        self.indices = torch.randperm(self.pages, device=DEVICE)
        self.indptr = torch.arange(batch + 1, device=DEVICE) * (context // PAGE)
        pos = torch.arange(context // PAGE, device=DEVICE).repeat(batch) * PAGE
        used, unused = (
            (self.indptr, self.indices, pos),
            (self.indptr * 0, self.indices[:0], pos[:0]),
        )
        first, second = (unused, used) if bf16_pages else (used, unused)
        lengths = torch.full((batch,), context, device=DEVICE)
        self.table = PageTable(*first, *second, seq_lens=lengths)
        self.q = torch.randn(batch, Q_HEADS, DIM, dtype=torch.bfloat16, device=DEVICE)
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
        return lambda layer: plan.run(self.q, layer, SCALE, 0.0, self.out)

    def triton(self) -> Run:
        plan = triton_decode.DecodePlan(self.kv, self.table, Q_HEADS, -1)
        return lambda layer: plan.run(self.q, layer, SCALE, 0.0, self.out)

    def flashinfer(self, dtype: torch.dtype) -> tuple[Run, torch.Tensor, torch.Tensor] | None:
        """FlashInfer over pages of `dtype`, and those pages [layers, pages, heads, 32, dim]."""
        try:
            import flashinfer
        except ImportError:
            return None
        shape = (self.layers, self.pages, KV_HEADS, PAGE, DIM)
        k, v = (torch.empty(shape, dtype=dtype, device=DEVICE) for _ in range(2))
        for pages, tiles, plain in (
            (k, self.kv.k_bfp8, self.kv.k_bf16),
            (v, self.kv.v_bfp8, self.kv.v_bf16),
        ):
            for layer in range(self.layers):
                bf16 = len(plain[layer]) > 0
                values = plain[layer] if bf16 else bfp8_unpack(tiles[layer][:, :, None])
                pages[layer] = values.view(shape[1:]).to(dtype)
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True
        )
        wrapper.plan(
            self.indptr.int(),
            self.indices.int(),
            torch.full((self.batch,), PAGE, dtype=torch.int32, device=DEVICE),
            *(Q_HEADS, KV_HEADS, DIM, PAGE),
            q_data_type=torch.bfloat16,
            kv_data_type=dtype,
            sm_scale=SCALE,
        )
        return lambda layer: wrapper.run(self.q, (k[layer], v[layer]), out=self.out), k, v

    def eager(self, attend: Run, k: torch.Tensor, v: torch.Tensor) -> Run:
        """Every page unpacked to BF16, then FlashInfer."""

        def run(layer: int) -> None:
            for pages, tiles in ((k, self.kv.k_bfp8), (v, self.kv.v_bfp8)):
                target = pages[layer].view(self.pages, KV_HEADS, 1, PAGE, DIM).flatten(2, 3)
                bfp8_unpack(tiles[layer][:, :, None], out=target)
            attend(layer)

        return run


def timed(run: Run, layers: int) -> Callable[[], float]:
    """Seconds a call: as many in a row as fill a round, between two events of the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(count: int) -> float:
        begin.record()
        for call in range(count):
            run(call % layers)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / count

    measure(layers)
    count = max(layers, min(1000, int(SECONDS_A_ROUND / measure(layers)) + 1))
    return lambda: measure(count)


def copy() -> Callable[[], float]:
    """Seconds a byte, read or written."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    once = timed(lambda _: target.copy_(source), 1)
    return lambda: once() / COPY_BYTES


def measure(batch: int, context: int, rounds: int, *, bf16_pages: bool = False) -> dict[str, Any]:
    console.print(f"decode attention: {batch} x {context}, BF16 pages: {bf16_pages}", style="dim")
    case = Case(batch, context, bf16_pages=bf16_pages)
    runs: dict[str, Run] = {"triton": case.triton()}
    if own := case.cuda():
        runs["cuda"] = own
    if peer := case.flashinfer(torch.bfloat16):
        runs["flashinfer bf16"] = peer[0]
        if not bf16_pages:
            runs["unpack, flashinfer bf16"] = case.eager(*peer)
    if not bf16_pages and (lossy := case.flashinfer(torch.float8_e4m3fn)):
        runs["flashinfer fp8"] = lossy[0]
    times = interleave(
        {"copy": copy(), **{name: timed(run, case.layers) for name, run in runs.items()}}, rounds
    )
    bandwidth = 1 / times["copy"].median
    point: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "pages": "bf16" if bf16_pages else "bfp8",
        "bytes": case.bytes,
        "copy_bytes_per_s": bandwidth,
        "ms": {name: times[name].median * 1e3 for name in runs},
        "spread": {name: times[name].spread for name in runs},
    }
    ours = "cuda" if "cuda" in runs else "triton"
    point["ours"] = ours
    point["times"] = {n: times[ours].times_faster_than(times[n]) for n in runs if n != ours}
    point["of_copy"] = statistics.median(
        case.bytes / own * byte
        for own, byte in zip(times[ours].rounds, times["copy"].rounds, strict=True)
    )
    return point


def exactness() -> dict[str, float]:
    """Largest error to float64 relative to the largest value, and runs that gave other bits."""
    case = Case(4, 4096)
    expected = torch.empty(case.q.shape, dtype=torch.float32, device=DEVICE)
    plan = portable.decode_plan(case.kv, case.table, Q_HEADS, -1)
    plan.run(case.q.float(), 0, SCALE, 0.0, expected)
    run = case.cuda() or case.triton()
    run(0)
    first = case.out.clone()
    error = ((first.float() - expected).abs().max() / expected.abs().max()).item()
    different = 0
    for _ in range(100):
        run(0)
        different += int(not torch.equal(case.out, first))
    return {"relative_error": error, "other_bits_in_100": different}


def show(points: list[dict[str, Any]]) -> None:
    names = sorted({name for point in points for name in point["ms"]})
    rows = [
        [
            f"{point['batch']} x {point['context']} {point['pages']}",
            *(f"{point['ms'][name]:.3f}" if name in point["ms"] else "-" for name in names),
            f"{point['bytes'] / point['ms'][point['ours']] / 1e6:.0f}",
            f"{point['of_copy']:.0%}",
        ]
        for point in points
    ]
    columns = ["requests x tokens", *(f"{name} ms" for name in names), "ours GB/s", "of copy"]
    table(f"{Q_HEADS} query heads, {KV_HEADS} KV heads, head_dim {DIM}", columns, rows)


def figures_of(
    main: dict[str, Any], plain: dict[str, Any], long: dict[str, Any], points: list[dict[str, Any]]
) -> list[Figure]:
    batch, context = MAIN
    where = f"{batch} x {context}"
    figures = [Figure(f"{where}, of a copy's bandwidth", main["of_copy"], 0.8)]
    for point, peer, name, target in (
        (main, "flashinfer bf16", f"{where}, speed of FlashInfer BF16", 1.6),
        (main, "flashinfer fp8", f"{where}, speed of FlashInfer FP8", 1 / 1.1),
        (plain, "flashinfer bf16", f"{where} in BF16 pages, speed of FlashInfer BF16", 1 / 1.05),
        (long, "flashinfer bf16", "1 x 32768, speed of FlashInfer BF16", 1.4),
    ):
        if peer in point["times"]:
            figures.append(Figure(name, point["times"][peer], target))
    eager = "unpack, flashinfer bf16"
    over = [point["times"][eager] for point in points if eager in point["times"]]
    if over:
        figures.append(Figure("slowest point, speed of unpacking first", min(over), 1))
    return figures


def plot(path: Path, points: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "hma"
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    points = sorted((p for p in points if p["pages"] == "bfp8"), key=lambda p: p["bytes"])
    for name in sorted({name for point in points for name in point["ms"]}):
        line = [(p["bytes"] / 1e6, p["ms"][name]) for p in points if name in p["ms"]]
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
    floor = [(p["bytes"] / 1e6, p["bytes"] / p["copy_bytes_per_s"] * 1e3) for p in points]
    axes.plot(*zip(*floor, strict=True), ":", color="black", label="BFP8 bytes at copy bandwidth")
    axes.set(xscale="log", yscale="log", xlabel="MB of BFP8 K and V", ylabel="ms a layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def gpu() -> dict[str, Any]:
    import triton

    try:
        from flashinfer import __version__ as flashinfer
    except ImportError:
        flashinfer = "not installed"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "flashinfer": flashinfer,
    }


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("decode_attention_gpu needs a GPU; torch sees none")
    about = gpu()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    exact = exactness()
    main_point = measure(*MAIN, args.rounds)
    plain = measure(*MAIN, args.rounds, bf16_pages=True)
    long = measure(*LONG, args.rounds)
    shapes = [] if args.quick else [shape for shape in SWEEP if shape != MAIN]
    points = [main_point, long, *(measure(*shape, args.rounds) for shape in shapes)]
    show([*points, plain])
    if args.plot:
        plot(args.plot, points)
    figures = [
        *figures_of(main_point, plain, long, points),
        Figure("error relative to float64", exact["relative_error"], 5e-3, False),
        Figure("other bits in 100 runs", exact["other_bits_in_100"], 0, False),
    ]
    finish(args, {"gpu": about, "exactness": exact, "points": [*points, plain]}, figures)


if __name__ == "__main__":
    main()
