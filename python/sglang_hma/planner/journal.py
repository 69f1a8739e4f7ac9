"""Answers that a search has had already, in a file: it goes on where it stopped."""

import hashlib
from pathlib import Path

import msgspec

from sglang_hma.planner.goodput import Goodput
from sglang_hma.planner.problem import Problem
from sglang_hma.planner.simulation.fleet import Colocated, Disaggregated


class JournalError(Problem):
    """One line: the file and what is wrong with it."""


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    goodput: Goodput


class Journal:
    """A line an answer, by what was asked: the fleet and everything about the question.

    A last line that was cut off when the program ended is dropped.
    """

    def __init__(self, path: Path) -> None:
        """Raises JournalError if there is a file that is no journal, or that cannot be written."""
        self._path = path
        self._known: dict[str, Goodput] = {}
        try:
            text = path.read_bytes() if path.exists() else b""
            whole, _, cut = text.rpartition(b"\n")
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    found = msgspec.json.decode(line, type=_Line)
                except msgspec.DecodeError as error:
                    raise JournalError(f"{path}:{number}: no line of a search: {error}") from error
                self._known[found.key] = found.goodput
            if cut:
                path.write_bytes(whole + b"\n" if whole else b"")
            self._file = path.open("ab")
        except OSError as error:
            raise JournalError(f"{path}: {error}") from error

    def get(self, key: str) -> Goodput | None:
        return self._known.get(key)

    def put(self, key: str, goodput: Goodput) -> None:
        """Written before it returns."""
        self._known[key] = goodput
        self._file.write(msgspec.json.encode(_Line(key, goodput)) + b"\n")
        self._file.flush()


def key_of(question: str, fleet: Colocated | Disaggregated) -> str:
    """`question`: all that is asked besides, as text."""
    return hashlib.sha256(f"{question}\n{fleet!r}".encode()).hexdigest()[:32]
