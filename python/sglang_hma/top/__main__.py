"""python -m sglang_hma.top URL...: what servers do at the moment."""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live

from sglang_hma.planner.live.fetch import Unheard
from sglang_hma.top.reading import Reading
from sglang_hma.top.screen import as_json, reasons, table
from sglang_hma.top.servers import base_url
from sglang_hma.top.watch import Row, Watch

NAME = "python -m sglang_hma.top"
WIDE = 200  # columns, where the output is no terminal


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        NAME,
        description="Show what servers do: requests, tokens, latencies, pages, the link between "
        "them. They run with --enable-metrics.",
        allow_abbrev=False,
    )
    made.add_argument(
        "url", nargs="+", metavar="URL", help="of a server, or of a router, which knows its servers"
    )
    made.add_argument("--once", action="store_true", help="one table, and the end")
    made.add_argument("--json", action="store_true", help="a line of JSON instead of each table")
    made.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="between two looks (2)"
    )
    made.add_argument(
        "--window", type=float, default=30.0, metavar="S", help="of rates and percentiles (30)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 if no server told anything; 2 for arguments that make no sense."""
    args = parser().parse_args(argv)
    try:
        for flag, value in (("--interval", args.interval), ("--window", args.window)):
            if not 0 < value < float("inf"):
                raise Unheard(f"{flag} is {value:g}: give seconds above 0")
        watch = Watch([base_url(url) for url in args.url], args.window)
    except Unheard as error:
        print(f"sglang_hma.top: error: {error}", file=sys.stderr)
        return 2
    try:
        return _once(watch, args) if args.once else _forever(watch, args)
    except KeyboardInterrupt:
        return 0


def _once(watch: Watch, args: argparse.Namespace) -> int:
    rows = watch.look()
    if any(isinstance(row, Reading) for row in rows):
        time.sleep(args.interval)
        rows = watch.look()
    if args.json:
        _print_json(rows)
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        console.print(_screen(rows, args.interval))
    return 0 if any(isinstance(row, Reading) for row in rows) else 1


def _forever(watch: Watch, args: argparse.Namespace) -> int:
    if args.json:
        while True:
            _print_json(watch.look())
            time.sleep(args.interval)
    with Live(console=Console(), auto_refresh=False, screen=sys.stdout.isatty()) as live:
        while True:
            live.update(_screen(watch.look(), args.window), refresh=True)
            time.sleep(args.interval)


def _screen(rows: Sequence[Row], window_s: float) -> Group:
    return Group(table(rows, window_s), *reasons(rows))


def _print_json(rows: Sequence[Row]) -> None:
    print(json.dumps({"at": time.time(), "servers": as_json(rows)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
