"""Decode attention on a GPU: BFP8 pages read as they lie, beside FlashInfer and unpacking first.

Ours reads pages in random order, in CUDA C++ and in Triton. Peers: FlashInfer's paged decode
kernels (plain, FA2 and FA3 on tensor cores, XQA) over the same tokens in BF16 and in FP8 (which
loses what BFP8 keeps), and unpacking all pages to BF16 before the best of those reads them. Every
candidate is a CUDA graph of its calls. The floor is a kernel's bytes over the bandwidth of a device
copy, measured in the same rounds. Layers are read in turn, more of them than the L2 cache holds.
"""

import gc
import math
import random
import statistics
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmark.common import Figure, console, finish, interleave, parser, table
from benchmark.kernels.gpu_case import (
    DEVICE,
    DIM,
    KV_HEADS,
    Q_HEADS,
    SCALE,
    Case,
    Run,
    captured,
    copied,
)
from benchmark.kernels.gpu_peers import PEERS, build
from hma_kernels import portable
from hma_kernels.base import DecodeCall

MAIN, LONG = (64, 8192), (1, 32768)
SWEEP = [(batch, 8192) for batch in (1, 4, 16, 67, 100, 128)]
SWEEP += [(batch, context) for context in (512, 2048, 32768) for batch in (1, 16)]
MIXED = 64  # requests of very different lengths
UNPACKING = "unpack, then the best of BF16"


def uniform(batch: int, context: int) -> tuple[str, list[int]]:
    return f"{batch} x {context}", [context] * batch


def mixed() -> tuple[str, list[int]]:
    """Lognormal lengths with a median of 2,048 tokens."""
    draw = random.Random(1)
    lengths = [round(2048 * math.exp(draw.gauss(0, 1))) for _ in range(MIXED)]
    return f"{MIXED} of mixed lengths", [min(max(length, 32), 32768) for length in lengths]


def timed_peers(case: Case, peers: list[str]) -> dict[str, Callable[[], float]]:
    """The peers and unpacking first, each a captured graph; one that cannot run is left out."""
    found: dict[str, Callable[[], float]] = {}
    plain: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
    best: tuple[float, Run] | None = None
    for name in peers:
        dtype, make = PEERS[name]
        if case.bf16_pages and dtype != torch.bfloat16:
            continue
        plain[dtype] = plain.get(dtype) or case.plain(dtype)
        try:
            run = make(case, *plain[dtype])
            found[name] = captured(run, case.layers)
        except Exception as error:
            console.print(f"{name}: {error}", style="red")
            continue
        seconds = found[name]()
        if dtype == torch.bfloat16 and (best is None or seconds < best[0]):
            best = seconds, run
    if best and not case.bf16_pages:
        found[UNPACKING] = captured(case.unpack_then(best[1], *plain[torch.bfloat16]), case.layers)
    return found


def measure(
    name: str, lengths: list[int], rounds: int, peers: list[str], *, bf16_pages: bool = False
) -> dict[str, Any]:
    console.print(f"decode attention: {name}, BF16 pages: {bf16_pages}", style="dim")
    case = Case(lengths, bf16_pages=bf16_pages)
    candidates = {"copy": copied(), "triton": captured(case.triton(), case.layers)}
    if own := case.cuda():
        candidates["cuda"] = captured(own, case.layers)
    candidates |= timed_peers(case, peers)
    times = interleave(candidates, rounds)
    names = [name for name in times if name != "copy"]
    ours = "cuda" if "cuda" in times else "triton"
    point = {
        "requests": name,
        "tokens": sum(lengths),
        "pages": "bf16" if bf16_pages else "bfp8",
        "bytes": case.bytes,
        "layers": case.layers,
        "copy_bytes_per_s": 1 / times["copy"].median,
        "ms": {name: times[name].median * 1e3 for name in names},
        "spread": {name: times[name].spread for name in names},
        "ours": ours,
        "times": {n: times[ours].times_faster_than(times[n]) for n in names if n != ours},
        "of_copy": statistics.median(
            case.bytes / own * byte
            for own, byte in zip(times[ours].rounds, times["copy"].rounds, strict=True)
        ),
    }
    del candidates, case, own
    gc.collect()
    torch.cuda.empty_cache()
    return point


def exactness() -> dict[str, float]:
    """Largest error to float64 relative to the largest value, and runs that gave other bits."""
    case = Case([4096] * 4)
    expected = torch.empty(case.q.shape, dtype=torch.float32, device=DEVICE)
    plan = portable.decode_plan(case.kv, case.table, Q_HEADS, -1)
    plan.run(DecodeCall(case.q.float(), 0, SCALE, 0.0, expected))
    found: dict[str, float] = {}
    for name, run in {"triton": case.triton(), "cuda": case.cuda()}.items():
        if run is None:
            continue
        case.out.fill_(torch.nan)
        run(0)
        first = case.out.clone()
        error = ((first.float() - expected).abs().max() / expected.abs().max()).item()
        different = 0
        for _ in range(100):
            run(0)
            different += int(not torch.equal(case.out, first))
        found |= {f"{name}_relative_error": error, f"{name}_other_bits_in_100": different}
    return found


def best_of(point: dict[str, Any], kind: str) -> tuple[str, float] | None:
    """The fastest FlashInfer kernel over pages of `kind`, and ours beside it."""
    times = {n: t for n, t in point["times"].items() if n in PEERS and n.endswith(kind)}
    return min(times.items(), key=lambda item: item[1]) if times else None


def show(points: list[dict[str, Any]]) -> None:
    rows = []
    for point in points:
        best = {kind: best_of(point, kind) for kind in ("bf16", "fp8")}
        rows.append(
            [
                f"{point['requests']} {point['pages']}",
                *(f"{point['ms'][n]:.4f}" if n in point["ms"] else "-" for n in ("cuda", "triton")),
                f"{point['bytes'] / point['ms'][point['ours']] / 1e6:.0f}",
                f"{point['of_copy']:.0%}",
                *(f"{b[1]:.2f} ({b[0].split()[1]})" if b else "-" for b in best.values()),
                f"{point['times'][UNPACKING]:.2f}" if UNPACKING in point["times"] else "-",
            ]
        )
    columns = ["requests x tokens", "cuda ms", "triton ms", "ours GB/s", "of copy"]
    columns += ["x FlashInfer BF16", "x FlashInfer FP8", "x unpacking"]
    table(f"{Q_HEADS} query heads, {KV_HEADS} KV heads, head_dim {DIM}", columns, rows)


def figures_of(
    main: dict[str, Any], plain: dict[str, Any], long: dict[str, Any], points: list[dict[str, Any]]
) -> list[Figure]:
    where = main["requests"]
    figures = [Figure(f"{where}, of a copy's bandwidth", main["of_copy"], 0.8)]
    for point, kind, name, target in (
        (main, "bf16", f"{where}, speed of FlashInfer BF16", 1.6),
        (main, "fp8", f"{where}, speed of FlashInfer FP8", 1 / 1.1),
        (plain, "bf16", f"{where} in BF16 pages, speed of FlashInfer BF16", 1 / 1.05),
        (long, "bf16", f"{long['requests']}, speed of FlashInfer BF16", 1.4),
    ):
        if best := best_of(point, kind):
            figures.append(Figure(f"{name} ({best[0]})", best[1], target))
    over = [point["times"][UNPACKING] for point in points if UNPACKING in point["times"]]
    if over:
        figures.append(Figure("slowest point, speed of unpacking first", min(over), 1))
    return figures


def plot(path: Path, points: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "hma"
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    points = sorted((p for p in points if p["pages"] == "bfp8"), key=lambda p: p["bytes"])
    for name in sorted({name for point in points for name in point["ms"]}):
        line = [(p["bytes"] / 1e6, p["ms"][name]) for p in points if name in p["ms"]]
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
    floor = [(p["bytes"] / 1e6, p["bytes"] / p["copy_bytes_per_s"] * 1e3) for p in points]
    axes.plot(*zip(*floor, strict=True), ":", color="black", label="BFP8 bytes at copy bandwidth")
    axes.set(xscale="log", yscale="log", xlabel="MB of BFP8 K and V", ylabel="ms a layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)


def gpu() -> dict[str, Any]:
    import triton

    try:
        from flashinfer import __version__ as flashinfer
    except ImportError:
        flashinfer = "not installed"
    wanted = "driver_version,clocks.max.sm,clocks.sm,clocks.mem,temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    state = subprocess.run(query, capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        wanted: state.stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "flashinfer": flashinfer,
    }


def usable_peers(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Each peer compiled and tried in a process of its own; those that answer rightly, and what
    is wrong with the others."""
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        return [], {"flashinfer": str(error)}
    lengths = [320, 64, 512]
    with ProcessPoolExecutor(len(names), mp_context=get_context("spawn")) as pool:
        said = {name: pool.submit(build, name, lengths) for name in names}
        wrong = {name: future.result() for name, future in said.items()}
    return [name for name in names if not wrong[name]], {n: w for n, w in wrong.items() if w}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--build", action="store_true", help="only compile and try the peers")
    arguments.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    args = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("decode_attention_gpu needs a GPU; torch sees none")
    about = gpu()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    peers, left_out = usable_peers(args.peers)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    if args.build:
        return
    exact = exactness()
    main_point = measure(*uniform(*MAIN), args.rounds, peers)
    plain = measure(*uniform(*MAIN), args.rounds, peers, bf16_pages=True)
    long = measure(*uniform(*LONG), args.rounds, peers)
    shapes = [] if args.quick else [*(uniform(*shape) for shape in SWEEP), mixed()]
    points = [main_point, long, *(measure(*shape, args.rounds, peers) for shape in shapes)]
    show([*points, plain])
    if args.plot:
        plot(args.plot, points)
    figures = figures_of(main_point, plain, long, points)
    for name, value in exact.items():
        bits = name.endswith("100")
        figures.append(Figure(name.replace("_", " "), value, 0 if bits else 5e-3, False))
    results = {"gpu": about, "left_out": left_out, "exactness": exact}
    finish(args, {**results, "points": [*points, plain]}, figures)


if __name__ == "__main__":
    main()
