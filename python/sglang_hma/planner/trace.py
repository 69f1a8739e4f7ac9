"""Requests over time: recorded, or drawn."""

import csv
import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sglang_hma.planner.problem import Problem

HASH_TOKENS = 512  # of a prefix block in Mooncake's traces
LONGEST_STEP_S, ENOUGH = 10.0, 100  # of a trace's clock; requests that tell it
APART_S = 1e4  # no request meets another


class TraceError(Problem):
    """One line: the file, the line and what is wrong with it."""


@dataclass(frozen=True)
class Request:
    """prefix_hashes: of each 512 tokens of the prompt, equal where the prompts are equal so far."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()


def load(path: Path) -> list[Request]:
    """CSV of timestamp_ms,input_length,output_length, or JSON lines of those and hash_ids.

    Either may be packed (.csv.gz, .jsonl.gz). Requests of one timestamp are spread: see `spread`.

    Raises TraceError: an unreadable line, a length below 1, times that go back.
    """
    try:
        packed = path.suffix == ".gz"
        kind = path.with_suffix("").suffix if packed else path.suffix
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8", newline="") as file:
            rows = _json_rows(path, file) if kind == ".jsonl" else _csv_rows(path, file)
            requests = list(rows)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error
    if not requests:
        raise TraceError(f"{path}: has no request")
    for line, (before, after) in enumerate(pairwise(requests), start=2):
        if after.arrival_s < before.arrival_s:
            raise TraceError(
                f"{path}: request {line} comes at {after.arrival_s * 1e3:.0f} ms, before the one "
                f"ahead of it ({before.arrival_s * 1e3:.0f} ms); sort by timestamp_ms"
            )
    return spread(requests)


def spread(requests: Sequence[Request]) -> list[Request]:
    """Requests of one timestamp, evenly over the step of the trace's clock, its smallest gap.

    A clock that ticks every few seconds, as Mooncake's traces have it, makes bursts that never
    were, and that no lower rate would part. Times stay as they are where most requests have a
    timestamp of their own, where there are fewer than ENOUGH, and beyond LONGEST_STEP_S.
    """
    groups = [list(group) for _, group in groupby(requests, key=lambda each: each.arrival_s)]
    gaps = (b[0].arrival_s - a[0].arrival_s for a, b in pairwise(groups))
    step = min(gaps, default=math.inf)
    sharing = sum(len(group) for group in groups if len(group) > 1)
    if len(requests) < ENOUGH or 2 * sharing <= len(requests) or step > LONGEST_STEP_S:
        return list(requests)
    return [
        dataclasses.replace(each, arrival_s=each.arrival_s + step * place / len(group))
        for group in groups
        for place, each in enumerate(group)
    ]


def _csv_rows(path: Path, lines: Any) -> Iterator[Request]:
    reader = csv.DictReader(lines)
    for row in reader:
        yield _request(path, reader.line_num, row)


def _json_rows(path: Path, lines: Any) -> Iterator[Request]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{path}:{number}: {error}") from error
        yield _request(path, number, row)


def _request(path: Path, line: int, row: Any) -> Request:
    try:
        arrival, given, made = (
            float(row[name]) for name in ("timestamp_ms", "input_length", "output_length")
        )
        hashes = tuple(int(each) for each in row.get("hash_ids") or ())
    except KeyError as error:
        raise TraceError(f"{path}:{line}: has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise TraceError(f"{path}:{line}: {error}") from error
    for name, value in (("input_length", given), ("output_length", made)):
        if not value >= 1 or value != int(value):
            raise TraceError(f"{path}:{line}: {name} is {value:g}; needs a whole number from 1 on")
    if not 0 <= arrival < float("inf"):
        raise TraceError(f"{path}:{line}: timestamp_ms is {arrival:g}; needs a time from 0 on")
    return Request(arrival / 1e3, int(given), int(made), hashes)


def at_rate(requests: Sequence[Request], rate: float) -> list[Request]:
    """The same requests in the same order and rhythm, `rate` a second on average."""
    span = requests[-1].arrival_s - requests[0].arrival_s
    scale = (len(requests) - 1) / rate / span if span else 0.0
    first = requests[0].arrival_s
    return [
        Request(
            (each.arrival_s - first) * scale,
            each.input_tokens,
            each.output_tokens,
            each.prefix_hashes,
        )
        for each in requests
    ]


def apart(requests: Sequence[Request]) -> list[Request]:
    """The same requests, each alone."""
    return [
        dataclasses.replace(each, arrival_s=APART_S * place) for place, each in enumerate(requests)
    ]


def excerpt(
    requests: Sequence[Request],
    start: int,
    count: int,
    rate: float,
    before_s: float = 0.0,
    after_s: float = 0.0,
) -> tuple[list[Request], slice]:
    """`count` requests from `start` on at `rate` a second, and those that come in so many seconds
    before the first and after the last, so that these are served amid a steady load.

    A trace that ends there begins again. The slice is of the requests that are meant.
    """
    total = len(requests)
    mean = (requests[-1].arrival_s - requests[0].arrival_s) / max(1, total - 1)
    before, after = math.ceil(before_s * rate), math.ceil(after_s * rate)
    first = start - before
    chosen = [requests[index % total] for index in range(first, start + count + after)]
    gaps = [
        # Where it begins again, the mean.
        mean if (first + index) % total == 0 else b.arrival_s - a.arrival_s
        for index, (a, b) in enumerate(pairwise(chosen), start=1)
    ]
    span = sum(gaps[before : before + count - 1]) if count > 1 else mean
    scale = max(1, count - 1) / rate / span if span else 0.0
    arrivals = [0.0, *accumulate(gap * scale for gap in gaps)]
    return [
        Request(at, each.input_tokens, each.output_tokens, each.prefix_hashes)
        for each, at in zip(chosen, arrivals, strict=True)
    ], slice(before, before + count)


def poisson(
    lengths: Sequence[tuple[int, int]], rate: float, count: int, seed: int
) -> list[Request]:
    """`count` requests at random moments, their lengths drawn from `lengths`."""
    rng = np.random.default_rng(seed)
    arrivals = rng.exponential(1 / rate, count).cumsum()
    chosen = rng.integers(0, len(lengths), count)
    return [Request(float(at), *lengths[which]) for at, which in zip(arrivals, chosen, strict=True)]
