"""python -m sglang_hma.planner: which fleet gives the most goodput for the money."""

import argparse
import sys
from collections.abc import Sequence

from sglang_hma.planner.commands import advise, catalogue, compare, deploy, fit
from sglang_hma.planner.problem import Problem

COMMANDS = (compare, fit, deploy, advise, catalogue)


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
    except Problem as problem:
        sys.exit(f"sglang_hma.planner: error: {problem}")


if __name__ == "__main__":
    main()
