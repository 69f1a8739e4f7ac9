"""Faults at random under load: make faults ARGS="--seconds 600 --seed N"

Prefill and decode servers behind launch_pd's router; clients that ask a fixed set of questions,
half of them as streams; faults as the seed has them. Afterwards every request must have had one
outcome, an answer with the tokens of the quiet run or an error that shows as one, every server must
serve and keep nothing, and no process may have grown. Exit code 1 if anything of that is not so.
"""

import argparse
import shlex
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_hma.demo.random_model import make_random_model

from . import check
from .fleet import OFTEN, Fleet, running
from .inject import Injector, Link, small_disk
from .load import Load, questions, quiet_answers
from .machine import machine
from .memory import Memory, growth
from .outcome import FAULTS
from .report import concluded
from .schedule import Kind, schedule

POOL_TOKENS = "8192"
SETTLED_S, MAX_GROWTH_MB = 60.0, 64.0


@dataclass
class Found:
    seed: int
    seconds: float
    machine: str
    requests: int = 0
    lost: int = 0  # without an outcome
    outcomes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0  # request
    restarts: int = 0
    growth_mb: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)  # by the beginning of their words
    wrong: list[str] = field(default_factory=list)
    logs: str = ""


def run(args: argparse.Namespace, folder: Path) -> Found:
    make_random_model(folder / "model")
    disk = folder / "logs"
    disk.mkdir(exist_ok=True)
    link = Link(folder / "link.json")
    link.change("flip", None)
    asked = questions(args.seed, args.questions)
    found = Found(args.seed, args.seconds, machine(), logs=str(folder))
    with small_disk(disk) as own_disk:
        flags = [*OFTEN, "--max-total-tokens", POOL_TOKENS]
        flags += ["--prefill-args", prefill_flags(disk / "trace.json", args.offload_threshold)]
        without: tuple[Kind, ...] = () if own_disk else ("full-disk",)
        counts = args.prefill, args.decode
        with running(folder / "model", folder, disk, *counts, *flags, env=link.env) as fleet:
            faults = schedule(args.seed, args.seconds, fleet.names, without)
            quiet = quiet_answers(fleet.url, asked)
            injector = Injector(fleet, link, disk)
            load = Load(fleet.url, asked, quiet, args.clients, args.seed)
            memory = Memory(fleet.rss, lambda: len(load.outcomes), fleet.served_again)
            with memory:
                with load:
                    begin = time.monotonic()
                    for fault in faults:
                        time.sleep(max(0.0, begin + fault.at_s - time.monotonic()))
                        injector.cause(fault)
                    time.sleep(max(0.0, begin + args.seconds - time.monotonic()))
                    injector.finish()
                _look_back(found, fleet, load, injector)
                for part in (check.healthy, check.nothing_kept):
                    found.wrong += part(fleet)
                found.wrong += check.same_answers(fleet, asked, quiet)
                found.restarts = fleet.text().count("serves again")
                time.sleep(3 * memory.every_s)
            _look_at_memory(found, memory)
        shutil.copytree(disk, folder / "kept")  # the small disk goes
    return found


def prefill_flags(trace: Path, offload: int) -> str:
    """A short prompt gets decode's weights; with the same on prefill it has one quiet answer."""
    flags = f"--hma-trace {shlex.quote(str(trace))}"
    short = f" --hma-offload-threshold {offload} --hma-weight-format native"
    return flags + short if offload else flags


def _look_back(found: Found, fleet: Fleet, load: Load, injector: Injector) -> None:
    found.requests, found.lost = load.begun, load.lost
    found.outcomes = dict(load.counts())
    found.longest_s = max((each.lasted_s for each in load.outcomes), default=0.0)
    found.faults = injector.happened
    refused = (each.words for each in load.outcomes if each.kind in ("refused", "cut"))
    found.refusals = dict(Counter(words[:44] for words in refused).most_common(12))
    if found.lost:
        found.wrong.append(f"{found.lost} requests have no outcome")
    found.wrong += [
        f"{each.kind}, {'stream' if each.streams else 'whole'}: {each.words[:300]}"
        for each in load.outcomes
        if each.kind in FAULTS
    ]


def _look_at_memory(found: Found, memory: Memory) -> None:
    last = memory.samples[-1].rss if memory.samples else {}
    for who in last:
        grown = growth(memory.samples, who, SETTLED_S)
        if grown:
            found.growth_mb[f"{who[1]} ({who[0]})"] = round(grown, 1)
        if grown > MAX_GROWTH_MB:
            found.wrong.append(f"{who[1]} has grown by {grown:.0f} MB, over {MAX_GROWTH_MB:g}")


def show(found: Found) -> None:
    table = Table("", "", title=f"seed {found.seed}, {found.seconds:g} s, {found.machine}")
    kinds = Counter(fault.partition(": ")[2].split()[0].rstrip(":") for fault in found.faults)
    rows: dict[str, Any] = {
        "requests": found.requests,
        "outcomes": ", ".join(f"{n} {kind}" for kind, n in sorted(found.outcomes.items())),
        "faults": ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())),
        "restarts": found.restarts,
        "longest request": f"{found.longest_s:.1f} s",
        "refused with": "\n".join(f"{n} x {words}" for words, n in found.refusals.items()),
        "memory, MB": "\n".join(f"{mb:+.1f} {who}" for who, mb in found.growth_mb.items()),
        "wrong": "\n".join(found.wrong) or "nothing",
        "logs": found.logs,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m test.faults", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of load and faults (600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefill", type=int, default=2, metavar="N")
    parser.add_argument("--decode", type=int, default=2, metavar="N")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument(
        "--offload-threshold",
        type=int,
        default=0,
        metavar="N",
        help="shorter prompts on decode (0)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--plan", action="store_true", help="print the faults of a seed, run nothing"
    )
    args = parser.parse_args()
    if args.plan:
        roles = (("prefill", args.prefill), ("decode", args.decode))
        names = tuple(f"{role}-{i}" for role, number in roles for i in range(number))
        print(*schedule(args.seed, args.seconds, names), sep="\n")
        return 0
    found = run(args, Path(tempfile.mkdtemp(prefix=f"hma-faults-{args.seed}-")))
    show(found)
    return concluded(found, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
