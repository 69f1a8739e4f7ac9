"""Record a run of a server, or of a pair behind its router: when requests came, and their tokens.

The line that it adds to a file is what `vllm bench serve --save-detailed` writes: input_lens,
output_lens, ttfts, itls, start_times. sglang.bench_serving does not say when a request came and
replays no lengths of a trace. Prompts are random ids, so that nothing is shared.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from benchmark.serving.pd_servers import Stream, read_stream
from sglang_hma.planner import trace
from sglang_hma.planner.trace import Request, at_rate, poisson

IDS = range(300, 4000)  # that every model has, and none of them special
TIMEOUT_S = 1800  # only to end a hang


def record(
    url: str, requests: Sequence[Request], tag: str, *, seed: int, alone: bool = False
) -> dict[str, Any]:
    """Send each request when it arrives, or `alone`: when the one before it is answered."""
    streams = asyncio.run(_all(url, requests, seed, alone))
    begin = min(start for start, _ in streams)
    details: dict[str, Any] = {
        "tag": tag,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "input_lens": [request.input_tokens for request in requests],
        "output_lens": [stream.counts[-1] for _, stream in streams],
        "start_times": [round(start - begin, 5) for start, _ in streams],
        "ttfts": [round(stream.ttft, 5) for _, stream in streams],
        "itls": [[round(gap, 5) for gap in _gaps(stream)] for _, stream in streams],
    }
    return details


def _gaps(stream: Stream) -> list[float]:
    """Between tokens; those of one message share the time since the message before."""
    gaps: list[float] = []
    for index in range(1, len(stream.seconds)):
        new = stream.counts[index] - stream.counts[index - 1]
        since = stream.seconds[index] - stream.seconds[index - 1]
        gaps += [since / new] * new if new else []
    return gaps


async def _all(
    url: str, requests: Sequence[Request], seed: int, alone: bool
) -> list[tuple[float, Stream]]:
    rng = random.Random(seed)
    bodies = [
        {
            "input_ids": rng.choices(IDS, k=request.input_tokens),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": request.output_tokens,
                "ignore_eos": True,
            },
            "stream": True,
        }
        for request in requests
    ]
    limits = {"timeout": aiohttp.ClientTimeout(total=TIMEOUT_S)}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), **limits) as session:
        if alone:
            return [await _one(session, url, body, 0.0) for body in bodies]
        begin = time.perf_counter() + 0.1
        pairs = zip(requests, bodies, strict=True)
        sent = [_one(session, url, body, begin + each.arrival_s) for each, body in pairs]
        return await asyncio.gather(*sent)


async def _one(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], at: float
) -> tuple[float, Stream]:
    await asyncio.sleep(max(0.0, at - time.perf_counter()))
    began = time.perf_counter()
    async with session.post(f"{url}/generate", json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{url} answers {reply.status}: {(await reply.text())[:500]}")
        stream = await read_stream(reply, began)
    if not stream.counts or stream.counts[-1] != body["sampling_params"]["max_new_tokens"]:
        raise RuntimeError(f"{url} ended an answer after {stream.counts[-1:]} tokens")
    return began, stream


def append(file: Path, details: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(details, separators=(",", ":")) + "\n")


def shorter(requests: Sequence[Request], share: float, most: tuple[int, int]) -> list[Request]:
    """The same requests with a share of their tokens, and at most so many of a prompt and new."""

    def fewer(tokens: int, limit: int) -> int:
        return min(limit, max(1, round(tokens * share)))

    return [
        replace(
            each,
            input_tokens=fewer(each.input_tokens, most[0]),
            output_tokens=fewer(each.output_tokens, most[1]),
            prefix_hashes=(),
        )
        for each in requests
    ]


def _lengths(text: str) -> tuple[int, int]:
    prompt, _, new = text.partition(":")
    if not (prompt.isdecimal() and new.isdecimal() and int(prompt) and int(new)):
        raise argparse.ArgumentTypeError(f"{text!r} is not PROMPT:NEW, two numbers from 1 on")
    return int(prompt), int(new)


def main() -> None:
    options = argparse.ArgumentParser(
        "python -m benchmark.planner.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("file", type=Path, help="JSON lines; a run is added")
    options.add_argument("--url", default="http://127.0.0.1:30000")
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--lengths", type=_lengths, nargs="+", metavar="PROMPT:NEW")
    what.add_argument("--trace", type=Path, metavar="FILE", help="its first requests")
    options.add_argument("--requests", type=int, default=50)
    options.add_argument("--rate", type=float, help="a second; Poisson, or the trace's rhythm")
    options.add_argument("--alone", action="store_true", help="one after the other")
    options.add_argument("--share", type=float, default=1.0, help="of a trace's tokens")
    options.add_argument("--most", type=_lengths, default=(1 << 20, 1 << 20), metavar="PROMPT:NEW")
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    options.add_argument("--tag", help="what to call the run")
    args = options.parse_args()
    if args.rate is None and not args.alone and not args.trace:
        options.error("--rate: give requests a second, or --alone")
    if args.lengths:
        requests = poisson(args.lengths, args.rate or 1.0, args.requests, args.seed)
    else:
        try:
            given = trace.load(args.trace)[: args.requests]
        except trace.TraceError as error:
            sys.exit(f"benchmark.planner.record: error: {error}")
        requests = shorter(at_rate(given, args.rate) if args.rate else given, args.share, args.most)
    tag = args.tag or (args.trace.stem if args.trace else "run")
    append(args.file, record(args.url, requests, tag, seed=args.seed, alone=args.alone))


if __name__ == "__main__":
    main()
