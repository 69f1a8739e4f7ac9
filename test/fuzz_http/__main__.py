"""Requests of every kind to every HTTP port of a pair: make fuzz-http ARGS="--count 10000 --seed N"

A prefill and a decode server behind launch_pd's router. Schemathesis draws requests from SGLang's
own OpenAPI document, right ones and wrong ones; more are good requests with a few fields at an
edge, and some are bent until they are no JSON or no HTTP. Meanwhile /health/live is 200 on both
servers; afterwards no process and no thread has ended, every request has had an end, both servers
answer as before and keep nothing, and no process has grown by MAX_GROWTH_MB. Answers of 5xx are
listed. Exit code 1 if anything of that is not so.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import requests
from rich.console import Console
from rich.table import Table

from sglang_hma import cluster_secret
from sglang_hma.demo.random_model import make_random_model
from sglang_hma.transfer.bootstrap import SEAL_HEADER, question
from sglang_hma.transfer.seals import seal

from ..faults import check
from ..faults.background import Background
from ..faults.fleet import Fleet, running
from ..faults.load import questions, quiet_answers
from ..faults.machine import machine
from ..faults.report import concluded
from . import routes
from .sending import Gun
from .shots import Maker, Shot, with_room

MB = 1e6
MAX_GROWTH_MB = 256.0
LOOK_EVERY_S, LIVE_WITHIN_S = 0.5, 60.0
POOL_TOKENS = "8192"
WEIGHTS: dict[routes.Target, int] = {
    "prefill": 20,
    "decode": 20,
    "both": 35,
    "bootstrap": 10,
    "router": 15,
}
WARM_UP = 0.1  # of the requests: what each process keeps from its first ones does not count


@dataclass
class Found:
    seed: int
    machine: str
    requests: int = 0
    seconds: float = 0.0
    slowest: list[str] = field(default_factory=list)  # seconds, answer and request
    statuses: dict[str, int] = field(default_factory=dict)  # by target and status; 0: none
    kinds: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)  # 5xx, by target, route, status, words
    growth_mb: dict[str, float] = field(default_factory=dict)
    live_checks: int = 0
    wrong: list[str] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)
    logs: str = ""


@dataclass
class Watch(Background):
    """Stops the gun once a process is gone or /health/live is not 200."""

    fleet: Fleet
    gun: Gun
    checks: int = 0
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.urls = [self.fleet.server(name).url for name in self.fleet.names]
        self.processes = self._all()

    def _all(self) -> dict[psutil.Process, str]:
        names = (*self.fleet.names, "router")
        return {each: name for name in names for each in self.fleet.processes(name)}

    def _work(self) -> None:
        while not self.stop.wait(LOOK_EVERY_S) and not self.wrong:
            self.wrong += [
                f"{name}: process {each.pid} is gone"
                for each, name in self.processes.items()
                if not each.is_running() or each.status() == psutil.STATUS_ZOMBIE
            ]
            self.wrong += [words for url in self.urls if (words := _live(url))]
            self.checks += len(self.urls)
            if self.wrong:
                self.gun.stop.set()


def _live(url: str) -> str:
    try:
        reply = requests.get(f"{url}/health/live", timeout=LIVE_WITHIN_S)
    except requests.RequestException as error:
        return f"{url}/health/live: {error!r}"[:300]
    return "" if reply.status_code == 200 else f"{url}/health/live: {reply.text[:200]}"


def threads(fleet: Fleet) -> dict[str, int]:
    """How many the schedulers and detokenizers have: they start none for a single request. Those
    that watch peers end when nothing was asked for a while, and others begin with the next."""
    found = {}
    for name in fleet.names:
        for title in ("scheduler", "detokenizer"):
            process = fleet.part(name, title)
            assert process is not None, f"{name} has no {title}"
            found[f"{name} {title}"] = process.num_threads()
    return found


def shooters(fleet: Fleet, count: int, rng: random.Random) -> tuple[dict, dict[str, list[int]]]:
    """What makes a shot for each target, and the ports that it goes to."""
    commands = {name: fleet.server(name).command for name in fleet.names}
    prefill, decode = (
        int(_after(commands[f"{role}-0"], "--port")) for role in ("prefill", "decode")
    )
    bootstrap = int(_after(commands["prefill-0"], "--disaggregation-bootstrap-port"))
    secret = _after(commands["prefill-0"], "--hma-cluster-secret-file")
    key = cluster_secret.ClusterKeys(cluster_secret.read(secret)).bootstrap
    document = requests.get(f"http://127.0.0.1:{prefill}/openapi.json", timeout=60).json()
    each = min(12, max(4, count // 150))  # the rest is made of these
    server = Maker(routes.of_server(document), each, rng.randrange(2**32))
    booting = Maker(routes.BOOTSTRAP, each * 4, rng.randrange(2**32))
    generating = frozenset(routes.GENERATING)

    def alone(target: routes.Target) -> Callable[[], Shot]:
        def make() -> Shot:
            shot = server.shot(target, None, 0.2)
            # Its other half never comes, so it takes its time.
            if shot.route in generating and rng.random() < 0.05:
                return with_room(shot, bootstrap, rng.randrange(1, 2**63))
            return shot

        return make

    def both() -> Shot:
        shot = server.shot("both", generating, 1.0)
        return with_room(shot, bootstrap, rng.randrange(1, 2**63))

    def at_bootstrap() -> Shot:
        shot = booting.shot("bootstrap", None, 0.0)
        if shot.raw is None and rng.random() < 0.7:
            sealed = seal(key, question(shot.method, shot.path), shot.body)
            shot = replace(shot, headers=(*shot.headers, (SEAL_HEADER, sealed)))
        return shot

    makers: dict[routes.Target, Callable[[], Shot]] = {
        "prefill": alone("prefill"),
        "decode": alone("decode"),
        "both": both,
        "bootstrap": at_bootstrap,
        "router": lambda: server.shot("router", routes.ROUTED, 0.6),
    }
    ports = {
        "prefill": [prefill],
        "decode": [decode],
        "both": [prefill, decode],
        "bootstrap": [bootstrap],
        "router": [fleet.port],
    }
    return makers, ports


def _after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def run(count: int, number: int, folder: Path) -> Found:
    make_random_model(folder / "model")
    asked = questions(number, 24)
    found = Found(number, machine(), logs=str(folder))
    rng = random.Random(number)
    flags = ("--max-total-tokens", POOL_TOKENS)
    with running(folder / "model", folder, folder, 1, 1, *flags, env={}) as fleet:
        quiet = quiet_answers(fleet.url, asked)
        makers, ports = shooters(fleet, count, rng)
        gun = Gun(ports, folder / "requests.jsonl")
        before_threads = threads(fleet)

        def some(number: int) -> Iterator[Shot]:
            for _ in range(number):
                (target,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
                yield makers[target]()

        watch = Watch(fleet, gun)
        with watch:
            began = time.monotonic()
            gun.fire(some(round(WARM_UP * count)))
            first = fleet.rss()
            gun.fire(some(count - round(WARM_UP * count)))
            found.seconds = time.monotonic() - began
        if watch.wrong:
            found.wrong += watch.wrong
            found.suspects = gun.suspects()
        else:
            found.wrong += check.healthy(fleet)
            found.wrong += check.nothing_kept(fleet)
            found.wrong += check.same_answers(fleet, asked, quiet)
            found.wrong += [
                f"{who} has {number} threads, {before_threads[who]} before"
                for who, number in threads(fleet).items()
                if number < before_threads[who]
            ]
            last = fleet.rss()
            found.growth_mb = {
                f"{who[1]} ({who[0]})": round((last[who] - rss) / MB, 1)
                for who, rss in first.items()
                if who in last
            }
            found.wrong += [
                f"{who} has grown by {mb:g} MB, over {MAX_GROWTH_MB:g}"
                for who, mb in found.growth_mb.items()
                if mb > MAX_GROWTH_MB
            ]
    _look_back(found, gun, watch)
    return found


def _look_back(found: Found, gun: Gun, watch: Watch) -> None:
    found.requests = gun.done
    found.slowest = [f"{seconds:g} s: {words}" for seconds, words in gun.slow]
    found.live_checks = watch.checks
    found.statuses = {f"{t} {s}": n for (t, s), n in sorted(gun.statuses.items())}
    found.kinds = dict(gun.kinds.most_common())
    found.errors = {
        f"{status} {target} {route}: {words}": n
        for (target, route, status, words), n in gun.errors.most_common()
    }
    found.wrong += [f"no end: {each.target} {each.method} {each.route}" for each in gun.hung]


def show(found: Found) -> None:
    table = Table("", "", title=f"seed {found.seed}, {found.machine}")
    rows = {
        "requests": f"{found.requests} in {found.seconds:.0f} s",
        "slowest": "\n".join(each[:300] for each in found.slowest),
        "statuses": ", ".join(f"{n} {each}" for each, n in found.statuses.items()),
        "kinds": ", ".join(f"{n} {each}" for each, n in found.kinds.items()),
        "5xx": "\n".join(f"{n} x {each}" for each, n in list(found.errors.items())[:60]) or "none",
        "memory, MB": "\n".join(f"{mb:+.1f} {who}" for who, mb in found.growth_mb.items()),
        "/health/live": f"asked {found.live_checks} times",
        "wrong": "\n".join(found.wrong) or "nothing",
        "suspects": "\n".join(found.suspects),
        "logs": found.logs,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(markup=False).print(table, markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m test.fuzz_http", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="of requests (10,000)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    print(f"{args.count} requests, seed {args.seed}", flush=True)
    found = run(args.count, args.seed, Path(tempfile.mkdtemp(prefix=f"hma-fuzz-{args.seed}-")))
    show(found)
    return concluded(found, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
