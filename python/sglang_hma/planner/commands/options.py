"""Options that several commands take, and what they mean."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from sglang_hma.planner import goodput, measured, scaled, trace
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.problem import Problem
from sglang_hma.planner.simulation.fleet import Policy
from sglang_hma.planner.systems import Offer, Site

OBJECTIVES = {
    "server": "server: 2 s to the first token and 100 ms for each other",
    "interactive": "interactive: 500 ms and 30 ms (both are MLPerf's)",
    "scaled": "scaled: 5 and 3 times the TTFT and TPOT that co-located cards have with no load, by "
    "the --share of requests",
}


class Refusal(Problem):
    """One line: flag, value and remedy."""


def add_command(
    commands: Any, name: str, run: Any, *, help: str, description: str
) -> argparse.ArgumentParser:
    """`run` is called with the parsed arguments."""
    result: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    result.set_defaults(run=run)
    return result


def add_catalogue(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--catalogue",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML with entries of your own, over the package's",
    )


def add_question(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--model", default="Qwen3-8B", help="a known name, a config.json or the folder of one"
    )
    group.add_argument(
        "--trace", type=Path, required=True, metavar="FILE", help="CSV, or JSON lines with hashes"
    )
    add_objectives(group, (*goodput.NAMED, "scaled"))
    group.add_argument("--seeds", type=int, default=3, help="windows of the trace")
    group.add_argument("--requests", type=int, default=2000, help="in a window")
    group.add_argument("--policy", choices=get_args(Policy), default="power_of_two")
    group.add_argument("--processes", type=int, default=os.cpu_count(), help="side by side")


def add_objectives(group: argparse._ActionsContainer, names: Sequence[str]) -> None:
    group.add_argument(
        "--objectives",
        choices=names,
        default="server",
        help="; ".join(OBJECTIVES[name] for name in names),
    )
    group.add_argument("--ttft", type=float, metavar="S", help="instead, with --tpot")
    group.add_argument("--tpot", type=float, metavar="S", help="instead, with --ttft")
    group.add_argument("--share", type=float, default=0.9, help="of requests that keep both")


def add_site(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument(
        "--times",
        type=Path,
        metavar="FILE",
        help="step times of ours' instances as `fit --save` writes them, instead of a model's",
    )
    add_catalogue(group)


def site_of(args: argparse.Namespace) -> Site:
    for name in ("hbm_cards", "gddr_cards", "chunk_tokens", "seeds", "requests"):
        value = getattr(args, name, 1)
        if value < 1:
            raise Refusal(f"--{name.replace('_', '-')} is {value}; needs 1 or more")
    names = (field for field in Site.__dataclass_fields__ if field != "measured")
    times = measured.load(args.times) if args.times else None
    return Site(**{name: getattr(args, name) for name in names}, measured=times)


def objectives_of(
    args: argparse.Namespace, baseline: Offer, requests: Sequence[trace.Request]
) -> Objectives:
    share = _share(args)
    if args.objectives == "scaled" and args.ttft is None and args.tpot is None:
        return scaled.objectives(baseline.fleet, requests, share)
    return plain_objectives(args)


def plain_objectives(args: argparse.Namespace) -> Objectives:
    """Those that are numbers by themselves."""
    share = _share(args)
    if (args.ttft is None) != (args.tpot is None):
        raise Refusal("--ttft and --tpot are one pair: give both, or --objectives")
    if args.ttft is not None:
        for flag, value in (("--ttft", args.ttft), ("--tpot", args.tpot)):
            if not value > 0:
                raise Refusal(f"{flag} is {value:g}; needs seconds above 0")
        return Objectives(args.ttft, args.tpot, share)
    named = goodput.NAMED[args.objectives]
    return Objectives(named.ttft_s, named.tpot_s, share)


def _share(args: argparse.Namespace) -> float:
    if not 0 < args.share < 1:
        raise Refusal(f"--share is {args.share:g}; needs a number between 0 and 1")
    return float(args.share)
