"""How soon a fleet serves again: python -m test.faults.recovery [--json FILE] [--check]

Two prefill and two decode servers behind launch_pd's router, under load:
  prefill death    kill -9 of all processes of one prefill server: to the end of the next good
                   request that began after it
  decode death     the same of both decode servers: from the first of them being ready again to the
                   end of the next good request
  one decode       the same of one of two, from the kill
  rolling restart  SIGTERM to each server in turn, the next one once the last serves again
"""

import argparse
import json
import random
import shlex
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglang_hma.demo.random_model import make_random_model

from ..e2e.harness import until
from .fleet import OFTEN, Fleet, running
from .load import Load, questions, quiet_answers
from .machine import machine
from .outcome import Outcome

PREFILL_BAR_S, DECODE_BAR_S = 5.0, 10.0
SETTLE_S = 8.0  # of load before a fault, and after the last of its failures
POOL_TOKENS = "8192"
CLIENTS = 6


@dataclass
class Event:
    name: str
    good_s: float | None = None  # to the next good request
    bar_s: float | None = None
    failed: int = 0  # requests
    failing_s: float = 0.0  # from the event to the last failed request's end
    slowest_s: float = 0.0
    requests: int = 0
    words: str = ""  # of the first failure
    bar_failed: int | None = None

    @property
    def passed(self) -> bool:
        late = self.bar_s is not None and (self.good_s is None or self.good_s >= self.bar_s)
        return not late and (self.bar_failed is None or self.failed <= self.bar_failed)


def good_since(load: Load, since: float) -> Callable[[], Outcome | None]:
    return lambda: load.first(lambda each: each.kind == "answered" and each.began_s >= since)


def watch(load: Load, event: Event, begin: float) -> Event:
    """Fill in what happened to the requests that were running at `begin` or came after it."""
    time.sleep(SETTLE_S)
    seen = [each for each in list(load.outcomes) if each.ended_s >= begin]
    failed = [each for each in seen if each.kind != "answered"]
    event.requests, event.failed = len(seen), len(failed)
    event.failing_s = max((each.ended_s - begin for each in failed), default=0.0)
    event.slowest_s = max((each.lasted_s for each in seen), default=0.0)
    event.words = failed[0].words[:200] if failed else ""
    return event


def prefill_death(fleet: Fleet, load: Load) -> Event:
    before, begin = fleet.returns("prefill-0"), time.monotonic()
    fleet.signal("prefill-0", signal.SIGKILL)
    good = until(good_since(load, begin), fleet)
    fleet.wait_return("prefill-0", before)
    return watch(load, Event("prefill death", good.ended_s - begin, PREFILL_BAR_S), begin)


def decode_death(fleet: Fleet, load: Load) -> Event:
    names = [name for name in fleet.names if name.startswith("decode")]
    before, begin = {name: fleet.returns(name) for name in names}, time.monotonic()
    for name in names:
        fleet.signal(name, signal.SIGKILL)
    until(lambda: any(fleet.returns(name) > before[name] for name in names), fleet)
    ready = time.monotonic()
    good = until(good_since(load, begin), fleet)
    event = Event("decode death (both)", good.ended_s - ready, DECODE_BAR_S)
    for name in names:
        fleet.wait_return(name, before[name])
    return watch(load, event, begin)


def one_decode(fleet: Fleet, load: Load) -> Event:
    before, begin = fleet.returns("decode-0"), time.monotonic()
    fleet.signal("decode-0", signal.SIGKILL)
    good = until(good_since(load, begin), fleet)
    fleet.wait_return("decode-0", before)
    return watch(load, Event("decode death (one)", good.ended_s - begin), begin)


def rolling_restart(fleet: Fleet, load: Load) -> Event:
    begin = time.monotonic()
    for name in fleet.names:
        before = fleet.returns(name)
        root = until(lambda name=name: fleet.main(name), fleet)
        root.send_signal(signal.SIGTERM)
        fleet.wait_return(name, before)
    event = Event("rolling restart", bar_failed=0)
    return watch(load, event, begin)


EVENTS = {
    "rolling": rolling_restart,
    "prefill": prefill_death,
    "one-decode": one_decode,
    "decode": decode_death,
}


def measure(wanted: list[str], folder: Path, clients: int, *flags: str) -> list[Event]:
    model = folder / "model"
    make_random_model(model)
    asked = questions(20261127, 32)
    flags = (*OFTEN, "--max-total-tokens", POOL_TOKENS, *flags)
    events = []
    with running(model, folder, folder, 2, 2, *flags, env={}) as fleet:
        quiet = quiet_answers(fleet.url, asked)
        for name in wanted:
            with Load(fleet.url, asked, quiet, clients, random.randrange(1 << 30)) as load:
                time.sleep(SETTLE_S)
                events.append(EVENTS[name](fleet, load))
            print(events[-1], load.counts(), flush=True)
    return events


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", nargs="+", choices=EVENTS, default=list(EVENTS))
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--flags", default="", help="more flags of launch_pd, one quoted string")
    parser.add_argument("--folder", type=Path, help="for logs; a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="hma-recovery-"))
    folder.mkdir(parents=True, exist_ok=True)
    events = measure(args.events, folder, args.clients, *shlex.split(args.flags))
    table = Table(title=f"2 prefill, 2 decode, {args.clients} clients; {machine()}")
    for column in ("event", "next good", "bar", "requests", "failed", "failing for", "slowest"):
        table.add_column(column)
    for each in events:
        good = "" if each.good_s is None else f"{each.good_s:.1f} s"
        bar = f"{each.bar_s:g} s" if each.bar_s else "0 failed" if each.bar_failed == 0 else ""
        table.add_row(
            each.name,
            good,
            bar,
            str(each.requests),
            str(each.failed),
            f"{each.failing_s:.1f} s",
            f"{each.slowest_s:.1f} s",
        )
    Console().print(table)
    if args.json:
        args.json.write_text(
            json.dumps({"cpu": machine(), "events": [asdict(e) for e in events]}, indent=1)
        )
    missed = [each.name for each in events if not each.passed]
    print(f"logs: {folder}" + (f"; missed: {', '.join(missed)}" if missed else ""))
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
