"""The best mix in a file that `compare --json` has written."""

from pathlib import Path

import msgspec

from sglang_hma.planner.deployment import DEPLOYABLE
from sglang_hma.planner.problem import Problem
from sglang_hma.planner.report import By
from sglang_hma.planner.systems import COLOCATED, Site, System


class NotChosen(Problem):
    """One line: the file, and why no mix can be taken from it."""


class Rate(msgspec.Struct):
    rate: float


class Mix(msgspec.Struct):
    system: System
    prefill: int
    decode: int
    goodput: Rate
    per_thousand_usd: float

    def __post_init__(self) -> None:
        if self.decode < 1 or self.prefill < (self.system not in COLOCATED):
            raise ValueError(f"{self.system} with {self.prefill} prefill and {self.decode} decode")


class Comparison(msgspec.Struct):
    """What of the file a deployment needs."""

    model: str
    site: Site
    mixes: list[Mix]

    def best(self, by: By, system: System | None) -> Mix | None:
        """Of one system, or of all that can be deployed; None where none serves anybody in time."""
        wanted = (system,) if system else DEPLOYABLE
        able = [mix for mix in self.mixes if mix.system in wanted and mix.goodput.rate > 0]
        if not able:
            return None
        return max(able, key=lambda m: m.goodput.rate if by == "goodput" else m.per_thousand_usd)


def read(file: Path) -> Comparison:
    """Raises NotChosen."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Comparison)
    except OSError as error:
        raise NotChosen(
            f"--from is {file}: {error.strerror}; compare --json FILE writes one"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotChosen(f"--from is {file}: not what compare --json writes: {error}") from error


def best_of(file: Path, by: By, system: System | None) -> tuple[Comparison, Mix]:
    """Raises NotChosen."""
    found = read(file)
    best = found.best(by, system)
    if best is None:
        raise NotChosen(
            f"--from is {file}: no mix of {system or 'any system'} keeps the objectives; compare "
            "with a larger budget or other objectives"
        )
    return found, best
