"""What a batch costs the Tenstorrent runtime: its calls, recorded, and the time they should take.

The server's forward runs on a recorder that stands in place of ttnn and computes shapes alone
(recorder.py), so the counts are of the calls that the runtime makes, and nothing about a model is
written down a second time. Times are predicted from them at the vendor's rates (predicted.py):
nothing here was measured.

    python -m benchmark.tenstorrent.cost --model Qwen3-8B --chunks 128 2048 8192 --batches 1 8 32
    python -m benchmark.tenstorrent.cost --chunks 2048 --batches --prefix 4096 --operations
    python -m benchmark.tenstorrent.cost --check        # against docs/benchmarks' earlier figures

An operation that the recorder does not know fails by its name; operations.py says how to add it.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmark.common import Figure, console, finish, parser, table
from benchmark.tenstorrent.counts import Counts, by_name, count
from benchmark.tenstorrent.driven import MODELS, Bucket, Recording, config_of, served
from benchmark.tenstorrent.predicted import CARDS, HOST_CALL_S, Prediction, linked, predict, rates
from sglang_hma.config import MESHES, WeightFormats
from sglang_hma.prefill.ttnn.shape import ModelShape

BEFORE = Path(__file__).parents[2] / "docs" / "benchmarks" / "tenstorrent_cost_before.json"
MOST_HOST_CALLS = 60
MOST_STREAMED = 1.05  # what layers share, such as a table of experts, is read in each
LEAST_SAVED = 0.5  # of the bytes outside matmuls
CHIPS = tuple(MESHES.values())
GB, MB, TERA = 1e9, 1e6, 1e12


@dataclass(frozen=True)
class Row:
    """A batch of a model: counts on one chip, seconds by card; None where it does not fit."""

    model: str
    bucket: Bucket
    counts: Counts
    cards: dict[str, Prediction | None]

    @property
    def key(self) -> tuple[str, Bucket]:
        return self.model, self.bucket

    def as_json(self) -> dict[str, Any]:
        times = {
            card: found and asdict(found) | {"utilization": found.utilization, "bound": found.bound}
            for card, found in self.cards.items()
        }
        bucket, counts = asdict(self.bucket), asdict(self.counts)
        return {"model": self.model, "bucket": bucket, "counts": counts, "cards": times}


def from_json(row: dict[str, Any]) -> Row:
    cards = {
        card: found and Prediction(**{n: found[n] for n in Prediction.__dataclass_fields__})
        for card, found in row["cards"].items()
    }
    return Row(row["model"], Bucket(**row["bucket"]), Counts(**row["counts"]), cards)


def rows_of(
    args: argparse.Namespace, model: str, buckets: Sequence[Bucket]
) -> Iterator[tuple[Row, Recording]]:
    config = config_of(model)
    shape = ModelShape.of(config)
    found = [rates(card, args.host_call_us * 1e-6, args.mesh) for card in args.cards]
    on = {each.card: each.shared(args.compute_share, args.memory_share) for each in found}
    by_chips: dict[int, list[Recording]] = {}
    for chips in sorted({1, *(each.chips for each in on.values())}):
        with served(config, chips) as server:
            what = f"{model} on {chips} chip{'s' * (chips > 1)}"
            steps = track(buckets, what, console=console)
            by_chips[chips] = [server.record(bucket) for bucket in steps]
    for index, bucket in enumerate(buckets):
        cards: dict[str, Prediction | None] = {}
        for card, each in on.items():
            fits = shape.split(each.chips).weight_bytes(WeightFormats()) < each.memory
            calls = by_chips[each.chips][index].calls
            cards[card] = predict(calls, each) if fits else None
        recorded = by_chips[1][index]
        yield Row(Path(model).name, bucket, count(recorded), cards), recorded


# Tables of counts: a title, and each column of it.
SHOWN: dict[str, dict[str, Callable[[Counts], str]]] = {
    "what the runtime calls for a batch": {
        "programs run": lambda found: f"{found.operations:,}",
        "of them new": lambda found: f"{found.new_programs}",
        "host calls": lambda found: f"{found.host_calls:,}",
        "of the forward": lambda found: f"{found.of_forward:,}",
        "waits": lambda found: f"{found.waits:,}",
    },
    "GB of DRAM, and how often the weights among them are streamed": {
        "matmuls": lambda found: f"{found.matmul_bytes / GB:.2f}",
        "attention": lambda found: f"{found.attention_bytes / GB:.2f}",
        "others": lambda found: f"{found.other_bytes / GB:.2f}",
        "weights": lambda found: f"{found.weight_bytes / GB:.2f}",
        "streamed": lambda found: f"x {found.weights_streamed:.2f}",
    },
    "TFLOP of products, MB over PCIe": {
        "matmuls": lambda found: _products(found.flops),
        "attention": lambda found: _products(found.attention_flops),
        "to the card": lambda found: f"{found.up_bytes / MB:.1f}",
        "to the host": lambda found: f"{found.down_bytes / MB:.1f}",
    },
}


def show(model: str, rows: Sequence[Row]) -> None:
    for title, columns in SHOWN.items():
        table(
            f"{model}, one chip: {title}",
            ("tokens", *columns),
            [(str(row.bucket), *(cell(row.counts) for cell in columns.values())) for row in rows],
        )
    names = list(rows[0].cards)
    table(
        f"{model}: PREDICTED ms; products' share of it at the peak; what is longest",
        ("tokens", *names),
        [(str(row.bucket), *(_time(row.cards[name]) for name in names)) for row in rows],
    )


def _products(flops: dict[str, int]) -> str:
    return ", ".join(f"{many / TERA:.2f} {fidelity}" for fidelity, many in flops.items() if many)


def _time(found: Prediction | None) -> str:
    if found is None:
        return "does not fit"
    return f"{found.total * 1e3:.4g} {found.utilization:.0%} {found.bound}"


def show_operations(model: str, recorded: Recording) -> None:
    table(
        f"{model}, {recorded.bucket}: by name",
        ("", "calls", "host calls", "MB of DRAM", "TFLOP"),
        [
            (
                line.name,
                f"{line.calls:,}",
                f"{line.host_calls:,}",
                f"{line.bytes / MB:,.1f}",
                f"{line.flops / TERA:.3f}",
            )
            for line in by_name(recorded.calls)
        ],
    )


def compare(
    rows: Sequence[Row], before: dict[tuple[str, Bucket], Row], named: str, *, times: bool
) -> None:
    """times: whether both were predicted at the same rates."""

    def change(old: float, new: float, form: str) -> str:
        return f"{old:{form}} → {new:{form}}"

    pairs = [(before[row.key], row) for row in rows if row.key in before]
    if not pairs:
        return
    table(
        f"Before{f' ({named})' if named else ''} → now, one chip",
        ("", "host calls", "GB in matmuls", "GB elsewhere", "weights streamed"),
        [
            (
                f"{new.model}, {new.bucket}",
                change(old.counts.host_calls, new.counts.host_calls, ",.0f"),
                change(old.counts.matmul_bytes / GB, new.counts.matmul_bytes / GB, ".2f"),
                change(old.counts.outside_bytes / GB, new.counts.outside_bytes / GB, ".2f"),
                change(old.counts.weights_streamed, new.counts.weights_streamed, ".2f"),
            )
            for old, new in pairs
        ],
    )
    common = [name for name in pairs[0][1].cards if name in pairs[0][0].cards]
    if not times or not common:
        return
    table(
        "Before → now: PREDICTED ms",
        ("", *common),
        [
            (
                f"{new.model}, {new.bucket}",
                *(
                    change(past.total * 1e3, now.total * 1e3, ".4g") if past and now else ""
                    for past, now in ((old.cards[name], new.cards[name]) for name in common)
                ),
            )
            for old, new in pairs
        ],
    )


def figures(rows: Sequence[Row], before: dict[tuple[str, Bucket], Row]) -> Iterator[Figure]:
    for row in rows:
        name, found = f"{row.model}, {row.bucket}", row.counts
        yield Figure(f"{name}: host calls", found.host_calls, MOST_HOST_CALLS, False)
        yield Figure(
            f"{name}: times weights are streamed", found.weights_streamed, MOST_STREAMED, False
        )
        yield Figure(f"{name}: programs compiled after start", found.new_programs, 0, False)
        if row.key in before:
            share = found.outside_bytes / before[row.key].counts.outside_bytes
            yield Figure(f"{name}: bytes outside matmuls by before's", share, LEAST_SAVED, False)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The examples keep their lines."""


def main() -> None:
    options = parser(__doc__ or "", timed=False)
    options.formatter_class = _Help
    add = options.add_argument
    known = ", ".join(MODELS)
    add("--model", nargs="+", default=["Qwen3-8B"], help=f"{known}, or a config.json's path")
    add("--chunks", type=int, nargs="*", default=[128, 2048, 8192], help="tokens of one prompt")
    add("--batches", type=int, nargs="*", default=[1, 8, 32], help="of so many short prompts")
    add("--short", type=int, default=100, help="tokens of a short prompt")
    add("--prefix", type=int, default=0, help="cached tokens before each prompt, a multiple of 32")
    add("--cards", nargs="+", choices=list(CARDS), default=list(CARDS), help="times are for")
    add("--mesh", type=int, default=1, help="so many cards share the model, of at most 4 chips")
    add("--host-call-us", type=float, default=HOST_CALL_S * 1e6, help="of a call, the host's")
    add("--compute-share", type=float, default=1.0, help="of the matrix engines' peak")
    add("--memory-share", type=float, default=1.0, help="of DRAM's bandwidth")
    add("--operations", action="store_true", help="also a table of each batch by operation")
    add("--of", default="", metavar="NAME", help="what is recorded, such as a commit; for --json")
    add("--before", type=Path, default=BEFORE, help="a file of --json to compare with")
    args = options.parse_args()
    if args.prefix % 32:
        options.error(f"--prefix {args.prefix}: no multiple of 32, the tokens of a page")
    if args.mesh > 1:
        args.cards = [card for card in args.cards if linked(card)]
    args.cards = [card for card in args.cards if rates(card, cards=args.mesh).chips in CHIPS]
    if not args.cards:
        options.error(f"--mesh {args.mesh}: no such mesh of --cards; a mesh is 1, 2 or 4 chips")
    buckets = [Bucket(tokens, 1, args.prefix) for tokens in args.chunks]
    buckets += [Bucket(args.short, many, args.prefix) for many in args.batches]
    if not buckets:
        options.error("--chunks and --batches are both empty: give one of them a number")
    rows: list[Row] = []
    for model in args.model:
        found = list(rows_of(args, model, buckets))
        show(Path(model).name, [row for row, _ in found])
        if args.operations:
            for _, recorded in found:
                show_operations(Path(model).name, recorded)
        rows += [row for row, _ in found]
    shares = {"compute": args.compute_share, "memory": args.memory_share}
    taken = shares | {"host_call_us": args.host_call_us}
    before, named, same_rates = {}, "", False
    if args.before.is_file():
        file = json.loads(args.before.read_text())
        before, named = {row.key: row for row in map(from_json, file["rows"])}, file["of"]
        same_rates = file["rates"] == taken
    compare(rows, before, named, times=same_rates)
    found_rows = [row.as_json() for row in rows]
    results = {"of": args.of, "rates": taken, "rows": found_rows}
    finish(args, results, list(figures(rows, before)))


if __name__ == "__main__":
    main()
