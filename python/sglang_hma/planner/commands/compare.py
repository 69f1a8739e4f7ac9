"""The best mix of each system within a budget."""

import argparse
from collections.abc import Callable
from functools import partial
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
from sglang_hma.planner.page.collect import collect
from sglang_hma.planner.page.subject import Subject
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
    compare.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page with charts and sliders that opens offline; simulates ours at the "
        "catalogue's other efficiencies and links too, which takes several times as long",
    )


def run(args: argparse.Namespace) -> None:
    known = catalogue.load(*args.catalogue)
    shape, site, requests = shape_of(args.model), site_of(args), trace.load(args.trace)
    budget = Budget(args.budget_usd, args.budget_watts, args.budget_instances)
    if budget == Budget():
        raise Refusal("no budget: give --budget-usd, --budget-watts or --budget-instances")
    if args.html and (args.html.is_dir() or not args.html.absolute().parent.is_dir()):
        raise Refusal(f"--html is {args.html}; needs a file in a folder that exists")
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

    def told(what: str, total: int) -> Callable[[], object]:
        return partial(progress.advance, progress.add_task(what, total=total))

    with progress:
        advance = told("mixes", len(offers))
        answers = search.ask(
            question,
            offers,
            processes=args.processes,
            heard=lambda _: advance(),
            journal=journal,
        )
    found = Comparison(shape.name, str(args.trace), site, objectives, answers)
    print_comparison(found, by=args.by)
    if args.json:
        args.json.write_bytes(msgspec.json.format(as_json(found), indent=1) + b"\n")
    if args.html:
        from sglang_hma.planner.page import html  # plotly takes a second to import

        subject = Subject(
            known, shape, budget, question, found, args.by, args.processes, progress=told
        )
        with progress:
            page = collect(subject)
        args.html.write_text(html.render(page), encoding="utf-8")
