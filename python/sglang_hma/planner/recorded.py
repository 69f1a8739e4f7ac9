"""Recorded runs of a real system: what each request asked for, when, and when its tokens came.

A run is a line of the file that `sglang.bench_serving --output-details` and `vllm bench serve
--save-detailed` write, one JSON object: input_lens, output_lens, ttfts and itls, one entry a
request, and start_times. SGLang's has no start_times; without them requests came one after the
other, which --max-concurrency 1 makes sure of.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_hma.planner.trace import Request

DETAILS = ("input_lens", "output_lens", "ttfts", "itls")


class RunError(ValueError):
    """One line: the file, the line and what is wrong with it."""


@dataclass(frozen=True)
class Run:
    """Seconds. Each request's first token came ttft_s after it arrived, every other one as long
    after the one before as gaps_s says. In order of arrival; the first arrives at 0."""

    name: str
    requests: tuple[Request, ...]
    ttft_s: tuple[float, ...]
    gaps_s: tuple[tuple[float, ...], ...]

    @property
    def tpot_s(self) -> list[float]:
        """Between tokens, on average; 0 for one token."""
        return [
            sum(gaps) / max(1, request.output_tokens - 1)
            for request, gaps in zip(self.requests, self.gaps_s, strict=True)
        ]

    @property
    def duration_s(self) -> float:
        """Until the last token of all."""
        return max(
            request.arrival_s + ttft + sum(gaps)
            for request, ttft, gaps in zip(self.requests, self.ttft_s, self.gaps_s, strict=True)
        )


def load(*paths: Path) -> list[Run]:
    """The runs of all files, one a line. Raises RunError: see _run."""
    return [run for path in paths for run in _runs(path)]


def _runs(path: Path) -> Iterator[Run]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: {error}") from error
    found = False
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found = True
            yield _run(f"{path}:{number}", path.stem, line)
    if not found:
        raise RunError(f"{path}: has no run")


def _run(where: str, stem: str, line: str) -> Run:
    """Raises RunError: no JSON, a detail that is missing or does not fit the others, a request that
    failed, a time that is none, nothing that says when requests came."""
    try:
        details = json.loads(line)
    except ValueError as error:
        raise RunError(f"{where}: {error}") from error
    if not isinstance(details, dict):
        raise RunError(f"{where}: is no JSON object of a run")
    for name in DETAILS:
        if not isinstance(details.get(name), list):
            raise RunError(
                f"{where}: has no {name}; record it with bench_serving's --output-details"
            )
    failed = [str(each) for each in details.get("errors") or () if each]
    if failed:
        why = failed[0].strip().splitlines()[-1][:200]
        raise RunError(f"{where}: {len(failed)} requests failed, the first with: {why}")
    given, made, ttfts, gaps = (details[name] for name in DETAILS)
    if not given:
        raise RunError(f"{where}: has no request")
    starts = _starts(where, details)
    for name, values in (*((name, details[name]) for name in DETAILS), ("start_times", starts)):
        if len(values) != len(given):
            raise RunError(f"{where}: {name} are {len(values)} for {len(given)} requests")
    first = min(starts)
    rows = []
    for index in sorted(range(len(given)), key=starts.__getitem__):
        place = f"{where}: request {index + 1}"
        prompt = _tokens(place, "input_lens", given[index])
        output = _tokens(place, "output_lens", made[index])
        own = tuple(_seconds(place, "itls", each) for each in gaps[index])
        if len(own) >= output:
            raise RunError(f"{place}: has {len(own)} itls and {output} output_lens; needs fewer")
        ttft = _seconds(place, "ttfts", ttfts[index])
        rows.append((Request(starts[index] - first, prompt, output), ttft, own))
    requests, first_tokens, between = zip(*rows, strict=True)
    return Run(str(details.get("tag") or stem), requests, first_tokens, between)


def _starts(where: str, details: dict[str, Any]) -> Sequence[float]:
    """When each request was sent."""
    given = details.get("start_times")
    if isinstance(given, list):
        return [_seconds(where, "start_times", each) for each in given]
    if details.get("max_concurrency") != 1:
        raise RunError(
            f"{where}: has no start_times, so nothing says when its requests came; record it with "
            "python -m benchmark.planner.record, or one after the other (--max-concurrency 1)"
        )
    starts, now = [], 0.0
    for ttft, gaps in zip(details["ttfts"], details["itls"], strict=False):
        starts.append(now)
        now += _seconds(where, "ttfts", ttft) + sum(_seconds(where, "itls", gap) for gap in gaps)
    return starts


def _tokens(where: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise RunError(f"{where}: {name} is {value!r}; needs a whole number from 1 on")
    return value


def _seconds(where: str, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise RunError(f"{where}: {name} is {value!r}; needs seconds from 0 on")
    return float(value)
