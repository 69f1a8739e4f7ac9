"""BFP8 codec: elements a second beside memcpy and, where it is installed, ttnn's host functions.

Bytes moved are what is read and written: 2 or 4 bytes an element and 1.0625 packed. The floor is
these bytes over memcpy's own bandwidth.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmark.common import Figure, Timing, console, finish, interleave, parser, table
from hma_kernels import bfp8_pack, bfp8_unpack, cpu

PACKED = 17 / 16
WIDTH = 4096
SIZES = [1 << n for n in (17, 19, 21, 23, 26)]


class Ttnn:
    """ttnn's packer in a process of its own, pinned to one core: it asks for another numpy."""

    def __init__(self, python: str, elements: int) -> None:
        script = Path(__file__).with_name("ttnn_peer.py")
        self._peer = subprocess.Popen(
            [python, str(script), str(elements)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, what: str) -> float:
        assert self._peer.stdin and self._peer.stdout
        print(what, file=self._peer.stdin, flush=True)
        for line in self._peer.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"--ttnn-python: the ttnn process ended with {self._peer.wait()}")

    def close(self) -> None:
        self._peer.kill()
        self._peer.wait()


def operations(elements: int) -> dict[str, tuple[float, Callable[[], object]]]:
    """Name -> bytes moved an element, and the call; buffers are allocated and touched once."""
    f32 = torch.randn(elements // WIDTH, WIDTH)
    bf16 = f32.bfloat16()
    tiles = bfp8_pack(bf16)
    out_f32, out_bf16 = torch.empty_like(f32), torch.empty_like(bf16)
    return {
        "memcpy": (8, lambda: out_f32.copy_(f32)),
        "pack bf16, device rounding": (2 + PACKED, lambda: bfp8_pack(bf16, out=tiles)),
        "pack f32, device rounding": (4 + PACKED, lambda: bfp8_pack(f32, out=tiles)),
        "pack f32, host rounding": (
            4 + PACKED,
            lambda: bfp8_pack(f32, rounding="host", out=tiles),
        ),
        "unpack to bf16": (2 + PACKED, lambda: bfp8_unpack(tiles, out=out_bf16)),
        "unpack to f32": (
            4 + PACKED,
            lambda: bfp8_unpack(tiles, dtype=torch.float32, out=out_f32),
        ),
    }


PEERS = {
    "pack f32, device rounding": "pack",
    "pack f32, host rounding": "pack",
    "unpack to bf16": "unpack bf16",
    "unpack to f32": "unpack f32",
}


def measure(
    elements: int, threads: int, isa: str, rounds: int, peer: Ttnn | None
) -> dict[str, Any]:
    cpu.set_isa(isa)
    cpu.set_threads(threads)
    torch.set_num_threads(threads)
    calls = operations(elements)
    candidates: dict[str, Callable[[], object]] = {name: call for name, (_, call) in calls.items()}
    if peer:
        for what in dict.fromkeys(PEERS.values()):
            candidates[f"ttnn {what}"] = lambda what=what: peer.run(what)
    times = interleave(candidates, rounds)
    memcpy = times["memcpy"]
    result: dict[str, Any] = {}
    for name, (size, _) in calls.items():
        timing: Timing = times[name]
        result[name] = {
            "elements_per_s": elements / timing.median,
            "bytes_per_s": elements * size / timing.median,
            "spread": timing.spread,
            "of_memcpy": timing.times_faster_than(memcpy) * size / 8,
        }
        if peer and name in PEERS:
            ttnn = times[f"ttnn {PEERS[name]}"]
            result[name]["times_ttnn"] = timing.times_faster_than(ttnn)
            result[name]["ttnn_elements_per_s"] = elements / ttnn.median
    return result


def show(title: str, result: dict[str, Any]) -> None:
    rows = [
        [
            name,
            f"{r['elements_per_s'] / 1e9:.2f}",
            f"{r['bytes_per_s'] / 1e9:.1f}",
            f"{r['of_memcpy']:.0%}",
            f"{r['times_ttnn']:.1f} x {r['ttnn_elements_per_s'] / 1e6:.0f} M"
            if "times_ttnn" in r
            else "-",
            f"{r['spread']:.0%}",
        ]
        for name, r in result.items()
    ]
    table(title, ["", "G el/s", "GB/s", "of memcpy", "of ttnn", "spread"], rows)


def figures(result: dict[str, Any]) -> list[Figure]:
    found = []
    for name, r in result.items():
        if name == "memcpy":
            continue
        found.append(Figure(f"{name}, 1 thread, of memcpy by bytes", r["of_memcpy"], 0.3))
        if "times_ttnn" in r:
            target = 8 if name.startswith("pack") else 4
            found.append(Figure(f"{name}, 1 thread, of ttnn", r["times_ttnn"], target))
    return found


def plot(path: Path, sweep: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "hma"
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in sweep[0]["result"]:
        points = [(s["elements"], s["result"][name]["bytes_per_s"] / 1e9) for s in sweep]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xscale="log", xlabel="elements", ylabel="GB/s read and written, 1 thread", ylim=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--elements", type=int, default=1 << 26, help="a multiple of 131072")
    options.add_argument(
        "--ttnn-python", metavar="PYTHON", help="a Python that has ttnn, to compare with"
    )
    args = options.parse_args()
    if args.elements <= 0 or args.elements % (32 * WIDTH):
        options.error(f"--elements is {args.elements}; needs a multiple of {32 * WIDTH}")
    best, most = cpu.isa(), cpu.threads()
    peer = Ttnn(args.ttnn_python, args.elements) if args.ttnn_python else None
    measured = []
    for isa in [best] if args.quick else cpu.available_isas():
        for threads in dict.fromkeys([1, most] if isa == best else [1]):
            console.print(f"codec: {isa}, {threads} threads", style="dim")
            with_peer = peer if isa == best and threads == 1 else None
            result = measure(args.elements, threads, isa, args.rounds, with_peer)
            measured.append({"isa": isa, "threads": threads, "result": result})
            show(f"{isa}, {threads} thread(s), {args.elements >> 20} Mi elements", result)
    if peer:
        peer.close()
    sweep = []
    if not args.quick:
        for elements in SIZES:
            console.print(f"codec: {elements} elements", style="dim")
            result = measure(elements, 1, best, args.rounds, None)
            sweep.append({"elements": elements, "result": result})
        if args.plot:
            plot(args.plot, sweep)
    cpu.set_isa(best)
    finish(args, {"measured": measured, "sweep": sweep}, figures(measured[0]["result"]))


if __name__ == "__main__":
    main()
