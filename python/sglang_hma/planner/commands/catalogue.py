"""What can be bought."""

import argparse
from typing import Any

from sglang_hma.planner import catalogue
from sglang_hma.planner.commands.options import add_catalogue, add_command
from sglang_hma.planner.report import print_catalogue


def add(commands: Any) -> None:
    show = add_command(
        commands,
        "catalogue",
        run,
        help="cards, hosts, links and efficiencies",
        description="Show every figure with its kind; the sources are in catalogue.yaml.",
    )
    add_catalogue(show)


def run(args: argparse.Namespace) -> None:
    print_catalogue(catalogue.load(*args.catalogue))
