"""The best mix of each system within a budget."""

import argparse
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sglang_hma.planner import catalogue, search, trace
from sglang_hma.planner.commands.options import (
    Refusal,
    add_command,
    add_question,
    add_site,
    objectives_of,
    site_of,
)
from sglang_hma.planner.journal import Journal
from sglang_hma.planner.model_shape import shape_of
from sglang_hma.planner.report import Comparison, as_json, print_comparison
from sglang_hma.planner.search import Budget, Question
from sglang_hma.planner.systems import SYSTEMS, TITLES, offer


def add(commands: Any) -> None:
    compare = add_command(
        commands,
        "compare",
        run,
        help="the best mix of each system within a budget",
        description="Simulate every mix of each system that the budget allows on a trace, and "
        "show the best of each: goodput, goodput per dollar, and what the figures rest on.",
    )
    add_question(compare)
    add_site(compare)
    compare.add_argument(
        "--budget-usd", type=float, metavar="USD", help="for cards, hosts and NICs"
    )
    compare.add_argument("--budget-watts", type=float, metavar="W")
    compare.add_argument("--budget-instances", type=int, metavar="N")
    compare.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=list(SYSTEMS),
        help="; ".join(f"{name}: {title}" for name, title in TITLES.items()),
    )
    compare.add_argument(
        "--by", choices=("goodput", "dollar"), default="dollar", help="what makes a mix the best"
    )
    compare.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep each mix's answer there; a search that was ended goes on where it stopped",
    )
    compare.add_argument("--json", type=Path, metavar="FILE", help="write every mix that was tried")


def run(args: argparse.Namespace) -> None:
    known = catalogue.load(*args.catalogue)
    shape, site, requests = shape_of(args.model), site_of(args), trace.load(args.trace)
    budget = Budget(args.budget_usd, args.budget_watts, args.budget_instances)
    if budget == Budget():
        raise Refusal("no budget: give --budget-usd, --budget-watts or --budget-instances")
    baseline = offer(known, shape, site, "colocated", 0, 1)
    objectives = objectives_of(args, baseline, requests)
    question = Question(
        requests, objectives, seeds=args.seeds, count=args.requests, policy=args.policy
    )
    offers = [
        each for system in args.systems for each in search.mixes(known, shape, site, system, budget)
    ]
    if not offers:
        raise Refusal("the budget buys no mix at all: raise it")
    journal = Journal(args.resume) if args.resume else None
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with progress:
        task = progress.add_task("mixes", total=len(offers))
        answers = search.ask(
            question,
            offers,
            processes=args.processes,
            heard=lambda _: progress.advance(task),
            journal=journal,
        )
    found = Comparison(shape.name, str(args.trace), site, objectives, answers)
    print_comparison(found, by=args.by)
    if args.json:
        args.json.write_bytes(msgspec.json.format(as_json(found), indent=1) + b"\n")
