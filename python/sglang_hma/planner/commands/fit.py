"""Step times from recorded runs, and the simulator beside them."""

import argparse
from pathlib import Path
from typing import Any

from sglang_hma.planner import fit, measured, recorded
from sglang_hma.planner.commands.options import Refusal, add_command
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.replay import Pair, beside
from sglang_hma.planner.report import print_beside, print_times


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "fit",
        run,
        help="step times from recorded runs of a pair, and the simulator's error beside them",
        description="Fit the step times of a prefill and a decode instance to runs that were "
        "recorded on them, let the same requests arrive in the simulator, and show what it says "
        "beside what was recorded. With --times nothing is fitted: fit to some runs with --save, "
        "then try others. Prompts are taken to share nothing.",
    )
    command.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="JSON lines, a run each: from python -m benchmark.planner.record, "
        "sglang.bench_serving --output-details --max-concurrency 1, or vllm bench serve "
        "--save-detailed",
    )
    plain = Pair()
    command.add_argument(
        "--chunk-tokens",
        type=int,
        default=plain.chunk_tokens,
        metavar="N",
        help="the prefill server's --chunked-prefill-size",
    )
    command.add_argument(
        "--kv-tokens", type=int, metavar="N", help="that the decode server holds (no limit)"
    )
    command.add_argument("--times", type=Path, metavar="FILE", help="take these step times")
    command.add_argument("--save", type=Path, metavar="FILE", help="write the fitted ones (YAML)")
    command.add_argument(
        "--ttft",
        type=float,
        metavar="S",
        help="objective for goodput, with --tpot (five times what a run's median request has "
        "alone)",
    )
    command.add_argument("--tpot", type=float, metavar="S", help="(three times)")


def run(args: argparse.Namespace) -> None:
    if args.times and args.save:
        raise Refusal("--save is for fitted times, --times fits none: leave one of them out")
    if (args.ttft is None) != (args.tpot is None):
        raise Refusal("--ttft and --tpot are one pair: give both or none")
    for flag in ("--chunk-tokens", "--kv-tokens", "--ttft", "--tpot"):
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value is not None and not value > 0:
            raise Refusal(f"{flag} is {value:g}; needs more than 0")
    pair = Pair(args.chunk_tokens, args.kv_tokens or Pair().kv_tokens)
    runs = recorded.load(*args.runs)
    if args.times:
        times = measured.load(args.times)
    else:
        source = f"fitted to {', '.join(dict.fromkeys(path.name for path in args.runs))}"
        times = fit.fit(runs, pair, source)
    print_times(times)
    for each in runs:
        objectives = (
            pair.objectives(times, each.requests)
            if args.ttft is None
            else Objectives(args.ttft, args.tpot)
        )
        print_beside(each, objectives, beside(each, pair, times, objectives))
    if args.save:
        measured.save(args.save, times)
