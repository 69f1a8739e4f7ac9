"""python -m sglang_hma.planner: which fleet gives the most goodput for the money."""

import argparse
import sys
from collections.abc import Sequence

from sglang_hma.planner.catalogue import CatalogueError
from sglang_hma.planner.chosen import NotChosen
from sglang_hma.planner.commands import advise, catalogue, compare, deploy
from sglang_hma.planner.commands.options import Refusal
from sglang_hma.planner.deployment import CannotStart
from sglang_hma.planner.live.advice import Unknown
from sglang_hma.planner.live.fetch import Unheard
from sglang_hma.planner.model_shape import ShapeError
from sglang_hma.planner.roofline import DoesNotFit
from sglang_hma.planner.simulation.batch import NeverFits
from sglang_hma.planner.trace import TraceError

COMMANDS = (compare, deploy, advise, catalogue)
PROBLEMS = (
    *(CatalogueError, ShapeError, TraceError, DoesNotFit, NeverFits, Refusal),
    *(CannotStart, NotChosen, Unheard, Unknown),
)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m sglang_hma.planner", description=__doc__, allow_abbrev=False
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except PROBLEMS as problem:
        sys.exit(f"sglang_hma.planner: error: {problem}")


if __name__ == "__main__":
    main()
