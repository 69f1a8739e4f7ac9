"""Which role is short, from live load."""

import argparse
from typing import Any

from sglang_hma.planner import catalogue
from sglang_hma.planner.commands.options import (
    Refusal,
    add_command,
    add_objectives,
    add_site,
    plain_objectives,
    site_of,
)
from sglang_hma.planner.deployment import DEPLOYABLE
from sglang_hma.planner.goodput import NAMED
from sglang_hma.planner.live import sources
from sglang_hma.planner.live.advice import Model, advise
from sglang_hma.planner.live.history import Server
from sglang_hma.planner.live.roles import see
from sglang_hma.planner.live.verdict import notes, print_seen, verdict
from sglang_hma.planner.model_shape import shape_of
from sglang_hma.planner.simulation.fleet import Disaggregated
from sglang_hma.planner.systems import COLOCATED, offer


def add(commands: Any) -> None:
    ask = add_command(
        commands,
        "advise",
        run,
        help="which role is short, from the metrics of servers that run",
        description="Say whether prefill or decode is short, and by how many instances, from the "
        "load that servers have now. They run with --enable-metrics, as deploy starts them.",
    )
    where = ask.add_argument_group("where the metrics are")
    one = where.add_mutually_exclusive_group(required=True)
    one.add_argument("--prometheus", metavar="URL", help="of a Prometheus server that has them")
    one.add_argument(
        "--metrics",
        nargs="+",
        metavar="URL",
        help="of every prefill and decode server, and of the router's metrics port if you like: "
        "each is read twice",
    )
    where.add_argument("--window", type=float, default=10, metavar="MIN", help="of --prometheus")
    where.add_argument(
        "--match",
        default="",
        metavar="M",
        help="of --prometheus: label matchers in PromQL, as 'namespace=\"serving\"'",
    )
    where.add_argument(
        "--interval", type=float, default=60, metavar="S", help="between the two of --metrics"
    )
    wanted = ask.add_argument_group("what is wanted")
    wanted.add_argument(
        "--target", type=float, default=0.8, help="utilization of an instance at this load"
    )
    add_objectives(wanted, tuple(NAMED))
    model = ask.add_argument_group("with the planner's step times")
    model.add_argument(
        "--model", help="counts decode instances by step times; known name, config.json or folder"
    )
    model.add_argument(
        "--system",
        choices=[name for name in DEPLOYABLE if name not in COLOCATED],
        default="ours",
        help="that the servers are; the hardware below is theirs",
    )
    add_site(ask)


def run(args: argparse.Namespace) -> None:
    if not 0 < args.target <= 1:
        raise Refusal(f"--target is {args.target:g}; needs a share from 0 to 1")
    for flag, value in (("--window", args.window), ("--interval", args.interval)):
        if not 0 < value < float("inf"):
            raise Refusal(f"{flag} is {value:g}; needs a time above 0")
    objectives = plain_objectives(args)
    model = _model(args)
    seen = see(_servers(args))
    print_seen(seen, objectives)
    for line in notes(seen):
        print(line)
    for line in verdict(
        advise(seen, objectives, args.target, model), seen, objectives, _made(args)
    ):
        print(line)


def _servers(args: argparse.Namespace) -> list[Server]:
    if args.prometheus:
        return sources.ask(args.prometheus, args.window, args.match)
    return sources.scrape(args.metrics, args.interval)


def _model(args: argparse.Namespace) -> Model | None:
    """Of one instance of each role."""
    if args.model is None:
        return None
    site, known = site_of(args), catalogue.load(*args.catalogue)
    fleet = offer(known, shape_of(args.model), site, args.system, 1, 1).fleet
    assert isinstance(fleet, Disaggregated)
    return Model(fleet.prefill_times, fleet.decode_times)


def _made(args: argparse.Namespace) -> dict[str, str]:
    """What an instance is, by role; nothing where nobody said."""
    if args.model is None:
        return {}
    site = site_of(args)
    hbm, gddr = f"{site.hbm_cards} x {site.hbm}", f"{site.gddr_cards} x {site.gddr}"
    return {"prefill": hbm if args.system.startswith("pd") else gddr, "decode": hbm}
