"""python -m sglang_hma.planner: which fleet gives the most goodput for the money."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sglang_hma.planner import catalogue, deploy, goodput, scaled, search, trace
from sglang_hma.planner.catalogue import CatalogueError
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.model_shape import ShapeError, shape_of
from sglang_hma.planner.report import Comparison, as_json, print_catalogue, print_comparison
from sglang_hma.planner.roofline import DoesNotFit
from sglang_hma.planner.search import Budget, Question
from sglang_hma.planner.simulation.batch import NeverFits
from sglang_hma.planner.simulation.fleet import Policy
from sglang_hma.planner.systems import SYSTEMS, TITLES, Offer, Site, offer
from sglang_hma.planner.trace import TraceError

# The others are there to be compared with: nothing here serves them.
DEPLOYABLE = ("ours", "hetero-serial", "pd-bf16", "pd-fp8", "colocated")
PROBLEMS = (CatalogueError, ShapeError, TraceError, DoesNotFit, NeverFits)


class Refusal(ValueError):
    """One line: flag, value and remedy."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m sglang_hma.planner", description=__doc__, allow_abbrev=False
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="the best mix of each system within a budget",
        description="Simulate every mix of each system that the budget allows on a trace, and "
        "show the best of each: goodput, goodput per dollar, and what the figures rest on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _question(compare)
    _site(compare)
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
    compare.add_argument("--json", type=Path, metavar="FILE", help="write every mix that was tried")
    compare.set_defaults(run=run_compare)

    start = commands.add_parser(
        "deploy",
        help="the commands that start a mix",
        description="Print the command of each host, prefill-N and decode-N, and the router's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    start.add_argument("--model", default="Qwen3-8B", help="whose sizes to plan with")
    start.add_argument("--model-path", required=True, metavar="M", help="where the hosts have it")
    start.add_argument("--system", choices=DEPLOYABLE, default="ours")
    start.add_argument("--prefill", type=int, default=1, metavar="N", help="instances")
    start.add_argument("--decode", type=int, default=1, metavar="N", help="instances")
    _site(start)
    start.set_defaults(run=run_deploy)

    show = commands.add_parser("catalogue", help="cards, hosts, links and efficiencies")
    _catalogue(show)
    show.set_defaults(run=run_catalogue)
    return result


def _catalogue(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--catalogue",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML with entries of your own, over the package's",
    )


def _question(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--model", default="Qwen3-8B", help="a known name, a config.json or the folder of one"
    )
    group.add_argument(
        "--trace", type=Path, required=True, metavar="FILE", help="CSV, or JSON lines with hashes"
    )
    group.add_argument(
        "--objectives",
        choices=(*goodput.NAMED, "scaled"),
        default="server",
        help="server: 2 s to the first token and 100 ms for each other; interactive: 500 ms and "
        "30 ms (MLPerf's); scaled: 5 and 3 times what co-located cards need with no load",
    )
    group.add_argument("--ttft", type=float, metavar="S", help="instead, with --tpot")
    group.add_argument("--tpot", type=float, metavar="S", help="instead, with --ttft")
    group.add_argument("--share", type=float, default=0.9, help="of requests that keep both")
    group.add_argument("--seeds", type=int, default=3, help="windows of the trace")
    group.add_argument("--requests", type=int, default=2000, help="in a window")
    group.add_argument("--policy", choices=get_args(Policy), default="power_of_two")
    group.add_argument("--processes", type=int, default=os.cpu_count(), help="side by side")


def _site(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hardware")
    plain = Site()
    group.add_argument("--hbm", default=plain.hbm, metavar="CARD")
    group.add_argument("--hbm-cards", type=int, default=plain.hbm_cards, help="of one instance")
    group.add_argument("--gddr", default=plain.gddr, metavar="CARD")
    group.add_argument("--gddr-cards", type=int, default=plain.gddr_cards, help="of one instance")
    group.add_argument(
        "--efficiency", default=plain.efficiency, help="of the GDDR cards, by catalogue name"
    )
    group.add_argument("--link", default=plain.link)
    group.add_argument("--chunk-tokens", type=int, default=plain.chunk_tokens)
    group.add_argument("--mixed", action="store_true", help="co-located: --enable-mixed-chunk")
    _catalogue(group)


def site_of(args: argparse.Namespace) -> Site:
    for name in ("hbm_cards", "gddr_cards", "chunk_tokens", "seeds", "requests"):
        value = getattr(args, name, 1)
        if value < 1:
            raise Refusal(f"--{name.replace('_', '-')} is {value}; needs 1 or more")
    names = (field for field in Site.__dataclass_fields__)
    return Site(**{name: getattr(args, name) for name in names})


def objectives_of(
    args: argparse.Namespace, baseline: Offer, requests: Sequence[trace.Request]
) -> Objectives:
    if not 0 < args.share < 1:
        raise Refusal(f"--share is {args.share:g}; needs a number between 0 and 1")
    if (args.ttft is None) != (args.tpot is None):
        raise Refusal("--ttft and --tpot are one pair: give both, or --objectives")
    if args.ttft is not None:
        for flag, value in (("--ttft", args.ttft), ("--tpot", args.tpot)):
            if not value > 0:
                raise Refusal(f"{flag} is {value:g}; needs seconds above 0")
        return Objectives(args.ttft, args.tpot, args.share)
    if args.objectives == "scaled":
        found = scaled.objectives(baseline.fleet, requests)
        return Objectives(found.ttft_s, found.tpot_s, args.share)
    named = goodput.NAMED[args.objectives]
    return Objectives(named.ttft_s, named.tpot_s, args.share)


def run_compare(args: argparse.Namespace) -> None:
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
            question, offers, processes=args.processes, heard=lambda _: progress.advance(task)
        )
    found = Comparison(shape.name, str(args.trace), site, objectives, answers)
    print_comparison(found, by=args.by)
    if args.json:
        args.json.write_bytes(msgspec.json.format(as_json(found), indent=1) + b"\n")


def run_deploy(args: argparse.Namespace) -> None:
    for flag, value in (("--prefill", args.prefill), ("--decode", args.decode)):
        if value < 1:
            raise Refusal(f"{flag} is {value}; needs 1 or more")
    known, site = catalogue.load(*args.catalogue), site_of(args)
    prefill = 0 if args.system == "colocated" else args.prefill
    found = offer(known, shape_of(args.model), site, args.system, prefill, args.decode)
    for line in deploy.lines(site, found, args.model_path):
        print(line)


def run_catalogue(args: argparse.Namespace) -> None:
    print_catalogue(catalogue.load(*args.catalogue))


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (*PROBLEMS, Refusal) as problem:
        sys.exit(f"sglang_hma.planner: error: {problem}")


if __name__ == "__main__":
    main()
