"""The commands that start a mix."""

import argparse
from typing import Any

from sglang_hma.planner import catalogue, deployment
from sglang_hma.planner.commands.options import Refusal, add_command, add_site, site_of
from sglang_hma.planner.model_shape import shape_of
from sglang_hma.planner.systems import offer

# The others are there to be compared with: nothing here serves them.
DEPLOYABLE = ("ours", "hetero-serial", "pd-bf16", "pd-fp8", "colocated")


def add(commands: Any) -> None:
    start = add_command(
        commands,
        "deploy",
        run,
        help="the commands that start a mix",
        description="Print the command of each host, prefill-N and decode-N, and the router's.",
    )
    start.add_argument("--model", default="Qwen3-8B", help="whose sizes to plan with")
    start.add_argument("--model-path", required=True, metavar="M", help="where the hosts have it")
    start.add_argument("--system", choices=DEPLOYABLE, default="ours")
    start.add_argument("--prefill", type=int, default=1, metavar="N", help="instances")
    start.add_argument("--decode", type=int, default=1, metavar="N", help="instances")
    add_site(start)


def run(args: argparse.Namespace) -> None:
    for flag, value in (("--prefill", args.prefill), ("--decode", args.decode)):
        if value < 1:
            raise Refusal(f"{flag} is {value}; needs 1 or more")
    known, site = catalogue.load(*args.catalogue), site_of(args)
    prefill = 0 if args.system == "colocated" else args.prefill
    found = offer(known, shape_of(args.model), site, args.system, prefill, args.decode)
    for line in deployment.lines(site, found, args.model_path):
        print(line)
