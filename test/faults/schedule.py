"""Which faults happen when: all of it follows from the seed, nothing from the run."""

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "kill-scheduler",  # SIGKILL
    "kill-detokenizer",
    "kill-server",  # every process of it
    "kill-router",
    "stop-server",  # SIGSTOP of every process of it, and SIGCONT `seconds` later
    "stop-scheduler",
    "end-server",  # SIGTERM, as of an operator
    "flip-bytes",  # of pages on the wire, for `seconds`
    "slow-link",
    "full-disk",  # of logs and the trace
]
# A fault of the whole fleet has no `server`.
EVERYWHERE: tuple[Kind, ...] = ("kill-router", "flip-bytes", "slow-link", "full-disk")
WEIGHTS: dict[Kind, int] = {
    "kill-scheduler": 2,
    "kill-detokenizer": 2,
    "kill-server": 3,
    "kill-router": 1,
    "stop-server": 3,
    "stop-scheduler": 2,
    "end-server": 2,
    "flip-bytes": 2,
    "slow-link": 2,
    "full-disk": 1,
}
PAUSE_S = (3.0, 15.0)  # between two faults
LASTS_S = (1.0, 12.0)


@dataclass(frozen=True)
class Fault:
    at_s: float  # since the start of the load
    kind: Kind
    server: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        where = f" {self.server}" if self.server else ""
        lasts = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.at_s:.1f} s: {self.kind}{where}{lasts}"


def schedule(
    seed: int, seconds: float, servers: tuple[str, ...], without: tuple[Kind, ...] = ()
) -> list[Fault]:
    """In the order of time. `without`: kinds that are drawn all the same, and left out then, so
    that the others of a seed stay as they are."""
    rng = random.Random(seed)
    faults, now = [], 0.0
    while True:
        now += rng.uniform(*PAUSE_S)
        kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        server, lasts = rng.choice(servers), rng.uniform(*LASTS_S)
        if now >= seconds:
            return faults
        if kind in without:
            continue
        has_end = kind in ("stop-server", "stop-scheduler", "flip-bytes", "slow-link", "full-disk")
        faults.append(
            Fault(now, kind, "" if kind in EVERYWHERE else server, lasts if has_end else 0.0)
        )
