"""Recorded runs of a real system: what each request asked for, when, and when its tokens came.

A run is a line of the file that `sglang.bench_serving --output-details` and `vllm bench serve
--save-detailed` write, one JSON object: input_lens, output_lens, ttfts and itls, one entry a
request, and start_times. SGLang's has no start_times; without them requests came one after the
other, which --max-concurrency 1 makes sure of.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import msgspec

from sglang_hma.planner.problem import Problem
from sglang_hma.planner.trace import Request

Tokens = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class RunError(Problem):
    """One line: the file, the line and what is wrong with it."""


class Details(msgspec.Struct):
    """What is read of a line."""

    input_lens: list[Tokens]
    output_lens: list[Tokens]
    ttfts: list[Annotated[float, msgspec.Meta(gt=0)]]
    itls: list[list[Seconds]]
    start_times: list[Seconds] | None = None
    max_concurrency: int | None = None
    errors: list[str] = []
    tag: str | None = None


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
    """The runs of all files, one a line.

    Raises RunError: a line that is no JSON, a detail that is missing or does not fit the others, a
    request that failed, nothing that says when requests came.
    """
    return [run for path in paths for run in _runs(path)]


def _runs(path: Path) -> Iterator[Run]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: {error}") from error
    if not any(line.strip() for line in lines):
        raise RunError(f"{path}: has no run")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                details = msgspec.json.decode(line, type=Details)
            except msgspec.DecodeError as error:
                raise RunError(
                    f"{path}:{number}: {error}; needs what bench_serving's --output-details writes"
                ) from error
            yield _run(f"{path}:{number}", details, path.stem)


def _run(where: str, details: Details, stem: str) -> Run:
    failed = [error for error in details.errors if error]
    if failed:
        why = failed[0].strip().splitlines()[-1][:200]
        raise RunError(f"{where}: {len(failed)} requests failed, the first with: {why}")
    count = len(details.input_lens)
    if not count:
        raise RunError(f"{where}: has no request")
    starts = _starts(where, details)
    for name in ("output_lens", "ttfts", "itls", "start_times"):
        values = starts if name == "start_times" else getattr(details, name)
        if len(values) != count:
            raise RunError(f"{where}: {name} are {len(values)} for {count} requests")
    for index, (gaps, made) in enumerate(zip(details.itls, details.output_lens, strict=True)):
        if len(gaps) >= made:
            raise RunError(f"{where}: itls[{index}] are {len(gaps)} for {made} tokens; needs fewer")
    first = min(starts)
    order = sorted(range(count), key=starts.__getitem__)
    return Run(
        details.tag or stem,
        tuple(
            Request(starts[i] - first, details.input_lens[i], details.output_lens[i]) for i in order
        ),
        tuple(details.ttfts[i] for i in order),
        tuple(tuple(details.itls[i]) for i in order),
    )


def _starts(where: str, details: Details) -> Sequence[float]:
    """When each request was sent."""
    if details.start_times is not None:
        return details.start_times
    if details.max_concurrency != 1:
        raise RunError(
            f"{where}: has no start_times, so nothing says when its requests came; record it with "
            "python -m benchmark.planner.record, or one after the other (--max-concurrency 1)"
        )
    spent = [ttft + sum(gaps) for ttft, gaps in zip(details.ttfts, details.itls, strict=False)]
    return list(accumulate(spent, initial=0.0))[:-1]
