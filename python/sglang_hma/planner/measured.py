"""Step times that were measured: what `fit --save` writes and `--times` reads, as YAML."""

from pathlib import Path
from typing import Annotated

import msgspec
import yaml

from sglang_hma.planner.catalogue import Figure
from sglang_hma.planner.problem import Problem
from sglang_hma.planner.step_times import Affine

Seconds = Annotated[float, msgspec.Meta(ge=0)]


class TimesError(Problem):
    """One line: the file and what is wrong with it."""


class PrefillTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a pass, of each of its tokens, and of each pair of tokens of which one sees the other."""

    pass_s: Seconds
    token_s: Seconds
    pair_s: Seconds


class DecodeTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a step, of each request in it, and of each token that its requests see."""

    step_s: Seconds
    request_s: Seconds
    seen_s: Seconds


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a prefill and a decode instance. overhead_s: of a request outside of passes and steps
    (HTTP, router, handshake, its last pages). source: the runs that they were fitted to."""

    source: str
    prefill: PrefillTimes
    decode: DecodeTimes
    overhead_s: Seconds = 0.0

    @property
    def affine(self) -> Affine:
        return Affine(
            **msgspec.structs.asdict(self.prefill),
            **msgspec.structs.asdict(self.decode),
            used=(Figure(1.0, "measured", self.source),),
        )


def load(path: Path) -> Measured:
    """Raises TimesError."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Measured)
    except (OSError, UnicodeDecodeError, msgspec.ValidationError, yaml.YAMLError) as error:
        raise TimesError(f"{path}: {' '.join(str(error).split())}") from error


def save(path: Path, times: Measured) -> None:
    """Raises TimesError."""
    text = yaml.safe_dump(msgspec.to_builtins(times), sort_keys=False)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TimesError(f"{path}: {error}") from error
