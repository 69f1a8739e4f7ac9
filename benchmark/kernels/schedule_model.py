"""A model of the CUDA decode kernel: which share of a card's bandwidth its schedule can reach, and
how long a call takes, beside what was measured.

The division is the kernel's own (schedule.cuh, compiled for the host). Memory is a fluid: all warps
that read share a device copy's bandwidth equally, and none is faster than its tiles in flight over
the latency of memory (Little's law). Where a warp goes on to another request or KV head it waits
once for memory. To that come

  partial states  written once and read once at the same bandwidth, where warps share a unit;
  queue           the bytes that all warps have in flight, once: when warps run out of tiles, memory
                  serves ever fewer of them. Counted in full, which is an upper bound;
  fixed           launches, loads that wait for each other, the merge: the time measured for the
                  shortest shape, less the model's other parts. Cards not measured get the same, and
                  the same share of their quoted bandwidth in a copy.

`schedule` is the floor (bytes over bandwidth) over the fluid's time and partial states: what waves,
spans and merging cost, which is what --check holds to the targets. `call` counts everything. What a
multiprocessor computes is not modelled: the kernel is taken to wait for memory only.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.common import Figure, finish, parser, table
from benchmark.kernels.decode_attention_gpu import mixed, uniform
from benchmark.kernels.decode_model import CARDS, LATENCY_S, Prediction, predict

MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "decode_attention_gpu.json"

TEN = [
    *(uniform(*shape) for shape in ((1, 32768), (1, 131072), (4, 8192), (16, 8192), (16, 32768))),
    *(uniform(*shape) for shape in ((64, 8192), (67, 8192), (100, 8192), (128, 8192))),
    mixed(),
]
LARGE_BATCH, LARGE_BATCH_SHARE = 16, 0.95
LONG_SHARE = 0.86  # of 1 x 32768
FARTHEST = 0.2  # of any measured time


@dataclass(frozen=True)
class Point:
    """One shape, as benchmark.kernels.decode_attention_gpu measured it."""

    name: str
    lengths: list[int]
    bf16_pages: bool
    copy_bandwidth: float
    seconds: float
    share: float


@dataclass(frozen=True)
class Measurement:
    """A file of decode_attention_gpu, on one of CARDS."""

    card: str
    points: list[Point]

    def predict(self, point: Point, fixed: float) -> Prediction:
        card = CARDS[self.card]
        bandwidth, bf16_pages = point.copy_bandwidth, point.bf16_pages
        return predict(card, point.lengths, bandwidth, fixed, bf16_pages=bf16_pages)

    def fixed(self) -> float:
        """Seconds of the shortest shape that the model's other parts do not explain."""
        shortest = min(self.points, key=lambda point: sum(point.lengths))
        return shortest.seconds - self.predict(shortest, 0).call

    def copy_share(self) -> float:
        """Of the card's quoted bandwidth, what a copy reached."""
        copies = [point.copy_bandwidth for point in self.points]
        return float(np.median(copies)) / CARDS[self.card].bandwidth


def lengths_of(name: str) -> list[int]:
    if " x " not in name:
        return mixed()[1]
    batch, context = map(int, name.split(" x "))
    return [context] * batch


def measurement(path: Path) -> Measurement:
    """Raises ValueError if it is of a card that is not in CARDS."""
    found = json.loads(path.read_text())
    gpu = found["gpu"]["gpu"]
    card = next((name for name in CARDS if name in gpu.lower()), None)
    if card is None:
        raise ValueError(f"{path} was measured on {gpu}; the model knows {', '.join(CARDS)}")
    points = {
        (point["requests"], point["pages"]): Point(
            *(point["requests"], lengths_of(point["requests"]), point["pages"] == "bf16"),
            *(point["copy_bytes_per_s"], point["ms"]["cuda"] / 1e3, point["of_copy"]),
        )
        for point in found["points"]
    }
    return Measurement(card, list(points.values()))


def as_json(prediction: Prediction) -> dict[str, Any]:
    shares = {"schedule": prediction.schedule_share, "call": prediction.call_share}
    return {**asdict(prediction), "call": prediction.call, "share": shares}


def modelled(name: str, copy_share: float, fixed: float) -> tuple[dict[str, Any], list[Figure]]:
    """The ten shapes on a card."""
    card = CARDS[name]
    bandwidth = card.bandwidth * copy_share
    rows, figures, results = [], [], {}
    for shape, lengths in TEN:
        made = predict(card, lengths, bandwidth, fixed)
        results[shape] = as_json(made)
        parts = (made.floor, made.streaming, made.partial_states, made.queue, made.fixed, made.call)
        rows.append(
            [
                *(shape, str(made.working_warps), str(made.most_tiles)),
                *(f"{part * 1e6:.1f}" for part in parts),
                *(f"{made.schedule_share:.1%}", f"{made.call_share:.0%}"),
            ]
        )
        target = LARGE_BATCH_SHARE if len(lengths) >= LARGE_BATCH else None
        if lengths == [32768]:
            target = LONG_SHARE
        if target is not None:
            what = f"{name}, {shape}, share of bandwidth that the schedule leaves"
            figures.append(Figure(what, made.schedule_share, target))
    columns = ["requests x tokens", "warps", "most tiles", "floor us", "reading", "states", "queue"]
    columns += ["fixed", "call", "schedule", "of copy"]
    title = f"{name}: {card.source}; a copy at {bandwidth / 1e12:.2f} TB/s. Modelled, not measured"
    table(title, columns, rows)
    return results, figures


def beside_measurement(measured: Measurement, fixed: float) -> list[dict[str, Any]]:
    rows, results = [], []
    for point in sorted(measured.points, key=lambda point: -point.seconds):
        made = measured.predict(point, fixed)
        off = made.call / point.seconds - 1
        name = point.name + (", BF16 pages" if point.bf16_pages else "")
        seen = {"seconds": point.seconds, "of_copy": point.share}
        results.append({"requests": name, "measured": seen, "model": as_json(made), "off_by": off})
        rows.append(
            [
                *(name, f"{made.call * 1e6:.1f}", f"{point.seconds * 1e6:.1f}", f"{off:+.0%}"),
                *(f"{made.schedule_share:.0%}", f"{made.call_share:.0%}", f"{point.share:.0%}"),
            ]
        )
    columns = ["requests x tokens", "model us", "measured us", "off by", "schedule"]
    columns += ["model, of copy", "measured, of copy"]
    table(f"{measured.card}: the model beside what was measured", columns, rows)
    return results


def main() -> None:
    arguments = parser(__doc__ or "", timed=False)
    arguments.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS), metavar="CARD")
    arguments.add_argument(
        "--measured", type=Path, default=MEASURED, metavar="FILE", help="of decode_attention_gpu"
    )
    args = arguments.parse_args()
    measured = measurement(args.measured)
    fixed, copy_share = measured.fixed(), measured.copy_share()
    figures, cards = [], {}
    for name in args.cards:
        cards[name], of_card = modelled(name, copy_share, fixed)
        figures += of_card
    beside = beside_measurement(measured, fixed)
    farthest = max(abs(point["off_by"]) for point in beside)
    figures.append(Figure("farthest from a measured time", farthest, FARTHEST, False))
    results = {"latency_s": LATENCY_S, "fixed_s": fixed, "copy_share": copy_share}
    finish(args, {**results, "cards": cards, "beside_measurement": beside}, figures)


if __name__ == "__main__":
    main()
