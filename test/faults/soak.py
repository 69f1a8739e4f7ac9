"""Does a pair's memory grow? make soak ARGS="--requests 20000 --check"

One prefill and one decode server behind launch_pd's router; small prompts and answers; the resident
memory of every process beside the number of requests that are done. After the warm-up a line is
laid through them by least squares: MB per 1,000 requests, each process by itself.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglang_hma.demo.random_model import make_random_model

from ..e2e.harness import until
from .fleet import running
from .load import Load, Question, questions, quiet_answers
from .machine import machine
from .memory import MB, Memory, slope

BAR_MB = 1.0  # per 1,000 requests
WARM_UP = 0.25  # of the requests: caches fill, threads start, the allocator keeps what it has freed
POOL_TOKENS = "8192"
OUTPUT_TOKENS = (2, 4, 8)


@dataclass
class Found:
    machine: str
    requests: int
    seconds: float
    outcomes: dict[str, int]
    first_mb: dict[str, float] = field(default_factory=dict)  # after the warm-up
    last_mb: dict[str, float] = field(default_factory=dict)
    slopes: dict[str, float] = field(default_factory=dict)  # MB per 1,000 requests
    samples: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        only_answers = set(self.outcomes) == {"answered"}
        return only_answers and all(each < BAR_MB for each in self.slopes.values())


def short(asked: list[Question]) -> list[Question]:
    return [
        Question(each.prompt[:100], OUTPUT_TOKENS[i % len(OUTPUT_TOKENS)])
        for i, each in enumerate(asked)
    ]


def run(requests: int, clients: int, folder: Path) -> Found:
    make_random_model(folder / "model")
    asked = short(questions(20261127, 64))
    flags = ("--max-total-tokens", POOL_TOKENS)
    with running(folder / "model", folder, folder, 1, 1, *flags, env={}) as fleet:
        quiet = quiet_answers(fleet.url, asked)
        load = Load(fleet.url, asked, quiet, clients, 0, limit=requests)
        with Memory(fleet.rss, lambda: len(load.outcomes)) as memory, load:
            begin = time.monotonic()
            until(lambda: load.done, fleet)
            seconds = time.monotonic() - begin
    found = Found(machine(), len(load.outcomes), seconds, dict(load.counts()))
    warm = [each for each in memory.samples if each.requests >= WARM_UP * requests]
    for who in sorted(memory.whole(), key=lambda who: who[1]):
        found.first_mb[who[1]] = round(warm[0].rss[who] / MB, 1)
        found.last_mb[who[1]] = round(warm[-1].rss[who] / MB, 1)
        found.slopes[who[1]] = round(slope(warm, who), 3)
    found.samples = [
        (each.requests, {who[1]: round(rss / MB, 2) for who, rss in each.rss.items()})
        for each in memory.samples[:: max(1, len(memory.samples) // 200)]
    ]
    return found


def show(found: Found) -> None:
    title = f"{found.requests} requests in {found.seconds:.0f} s, {found.outcomes}; {found.machine}"
    table = Table("process", "MB, warm", "MB, last", "MB per 1,000 requests", title=title)
    for name, each in found.slopes.items():
        first, last = found.first_mb[name], found.last_mb[name]
        table.add_row(name, f"{first:.1f}", f"{last:.1f}", f"{each:+.3f}")
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m test.faults.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--json", type=Path, metavar="FILE")
    text = f"exit code 1 if a process grows by {BAR_MB:g} MB per 1,000 requests, or one fails"
    parser.add_argument("--check", action="store_true", help=text)
    args = parser.parse_args()
    found = run(args.requests, args.clients, Path(tempfile.mkdtemp(prefix="hma-soak-")))
    show(found)
    if args.json:
        args.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
    return 1 if args.check and not found.passed else 0


if __name__ == "__main__":
    raise SystemExit(main())
