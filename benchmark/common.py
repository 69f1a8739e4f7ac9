"""What every benchmark shares: paired timing, a table, JSON, and figures held to targets."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(stderr=True)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one candidate."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return (high - low) / 2 / self.median

    def times_faster_than(self, peer: "Timing") -> float:
        """Median over rounds of peer / self: both ran in each round, so noise hits both."""
        return statistics.median(p / s for p, s in zip(peer.rounds, self.rounds, strict=True))


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times every candidate once a round, after one warm-up round; at least 4 rounds.

    A candidate that returns a float has timed itself, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(max(rounds, 4) + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            own = run()
            elapsed = own if isinstance(own, float) else time.perf_counter() - start
            if index:
                times[name].append(elapsed)
    return {name: Timing(values) for name, values in times.items()}


@dataclass(frozen=True)
class Figure:
    """A measured number and the target it is held to."""

    name: str
    value: float
    target: float
    at_least: bool = True

    @property
    def reached(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "ok" if self.reached else "FALLS SHORT"
        return f"{verdict}: {self.name}: {self.value:.3g} (target {sign} {self.target:g})"


def parser(description: str, *, timed: bool = True) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if timed:
        result.add_argument("--rounds", type=int, default=9, help="paired rounds a figure; medians")
        result.add_argument("--quick", action="store_true", help="without the sweeps")
    result.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    result.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (.svg, .png)")
    result.add_argument(
        "--check", action="store_true", help="exit 1 if a figure falls short of its target"
    )
    return result


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    view = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        view.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        view.add_row(*row)
    Console().print(view)


def machine() -> dict[str, Any]:
    """What a reader needs to know about where figures come from."""
    import torch

    from hma_kernels import describe

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "kernels": describe(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def finish(args: argparse.Namespace, results: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """Prints the figures, writes --json, and exits 1 under --check if one falls short."""
    for figure in figures:
        print(figure)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "machine": machine(),
            "figures": [asdict(figure) | {"reached": figure.reached} for figure in figures],
            **results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.check and not all(figure.reached for figure in figures):
        sys.exit(1)
