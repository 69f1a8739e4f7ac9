"""The planner's simulator beside a real prefill/decode pair on this machine.

A pair whose halves share no core serves requests of mixed lengths, alone, in bursts and as a
Poisson stream; step times are fitted to these. Then two shapes of prompts and an excerpt of a
recorded trace arrive at 30, 60 and 90% of what the pair takes when all come at once, and the same
requests arrive in the simulator. Objectives for goodput are five times the TTFT and three times
the TPOT that a run's median request has alone. About a quarter of an hour a model; on a
CPU without BF16 instructions SmolLM2 takes hours.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmark.common import Figure, console, finish, parser, table
from benchmark.planner.record import append, record, shorter
from benchmark.planner.separate_pair import separate_pair
from sglang_hma.demo import smollm2
from sglang_hma.demo.random_model import make_random_model
from sglang_hma.planner import recorded, trace
from sglang_hma.planner.fit import fit
from sglang_hma.planner.measured import Measured
from sglang_hma.planner.recorded import Run
from sglang_hma.planner.replay import Beside, Pair, beside
from sglang_hma.planner.report import print_times
from sglang_hma.planner.trace import Request, at_rate, poisson

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "docs" / "benchmarks" / "planner_real"
TRACE = Path(__file__).parent / "traces" / "azure2023_conv.csv"
CHUNK_TOKENS = 4096
FLAGS = (
    *("--chunked-prefill-size", str(CHUNK_TOKENS)),
    *("--prefill-args", "--disable-radix-cache"),
)
LOADS = (0.3, 0.6, 0.9)
SHAPES = {"128 in, 64 out": (128, 64), "768 in, 32 out": (768, 32)}
# A quarter of the tokens that were recorded, so that a small CPU is no slower than the trace.
EXCERPT, SHARE, MOST = "conversations", 0.25, (1024, 64)
CALIBRATION = "calibration"
ALONE, BURSTS, BURST = 20, (2, 4, 8, 2, 4, 8), 8
WARM = 8
AT_ONCE, LEAST, MANY = 24, 24, 1000
MODELS = ("random", "smollm2")
TARGETS = {"TTFT": 0.15, "TPOT": 0.15, "goodput": 0.1}


class Recorder:
    """Adds runs of one pair to a file."""

    def __init__(self, url: str, file: Path, model: str, seconds: float, seed: int) -> None:
        self.url, self.file, self.model, self.seconds = url, file, model, seconds
        self.rng = np.random.default_rng(seed)

    def all(self) -> None:
        mixed = self._mixed(ALONE)
        # Servers take tens of milliseconds longer for each of their first requests.
        record(self.url, mixed, "warm-up", seed=self._seed(), alone=True)
        for _ in range(WARM):
            record(self.url, at_once(self._mixed(BURST)), "warm-up", seed=self._seed())
        self._run(f"{CALIBRATION}, alone", mixed, alone=True)
        spent = [
            self._run(f"{CALIBRATION}, burst {i + 1}", at_once(self._mixed(burst)))
            for i, burst in enumerate(BURSTS)
        ]
        rate = 0.6 * sum(BURSTS) / sum(spent)
        self._run(f"{CALIBRATION}, Poisson", self._arriving(self._mixed(MANY), rate))
        for name, lengths in SHAPES.items():
            self._loads(name, [Request(0.0, *lengths)] * MANY)
        self._loads(EXCERPT, shorter(trace.load(TRACE)[:MANY], SHARE, MOST))

    def _loads(self, name: str, requests: Sequence[Request]) -> None:
        """Requests of one moment arrive as a Poisson stream, others in their own rhythm."""
        capacity = AT_ONCE / self._run(f"{name}, all at once", at_once(requests[:AT_ONCE]))
        for load in LOADS:
            rate = load * capacity
            if requests[-1].arrival_s:
                chosen = at_rate(requests[: self._count(rate)], rate)
            else:
                chosen = self._arriving(requests, rate)
            self._run(f"{name}, {load:.0%}", chosen)

    def _count(self, rate: float) -> int:
        return min(MANY, max(LEAST, round(rate * self.seconds)))

    def _mixed(self, count: int) -> list[Request]:
        prompts = np.exp(self.rng.uniform(np.log(32), np.log(1024), count))
        return [
            Request(0.0, int(prompt), int(new))
            for prompt, new in zip(prompts, self.rng.integers(8, 49, count), strict=True)
        ]

    def _arriving(self, requests: Sequence[Request], rate: float) -> list[Request]:
        times = poisson([(1, 1)], rate, self._count(rate), self._seed())
        return [
            Request(at.arrival_s, each.input_tokens, each.output_tokens)
            for at, each in zip(times, requests, strict=False)
        ]

    def _run(self, tag: str, requests: Sequence[Request], *, alone: bool = False) -> float:
        """Seconds that it took."""
        details = record(self.url, requests, tag, seed=self._seed(), alone=alone)
        append(self.file, {"model": self.model, "servers": FLAGS, **details})
        spent = recorded.load(self.file)[-1].duration_s
        console.print(f"{self.model}: {tag}: {len(requests)} requests in {spent:.0f} s")
        return spent

    def _seed(self) -> int:
        return int(self.rng.integers(2**31))


def at_once(requests: Sequence[Request]) -> list[Request]:
    return [Request(0.0, each.input_tokens, each.output_tokens) for each in requests]


def run_pair(model: str, file: Path, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = smollm2.get() if model == "smollm2" else make_random_model(Path(folder) / "model")
        log = Path(folder) / "pair.log"
        file.unlink(missing_ok=True)
        with separate_pair(path, args.port, log, FLAGS) as url:
            Recorder(url, file, model, args.seconds, args.seed).all()


def judge(file: Path) -> tuple[Measured, list[tuple[Run, list[Beside]]]]:
    """Times fitted to the calibration, and the other runs beside them."""
    runs = recorded.load(file)
    fitted_to = [run for run in runs if run.name.startswith(CALIBRATION)]
    pair = Pair(CHUNK_TOKENS)
    times = fit(fitted_to, pair, f"fitted to {len(fitted_to)} runs of {file.name}")
    return times, [
        (run, beside(run, pair, times, pair.objectives(times, run.requests)))
        for run in runs
        if run.name.endswith("%")
    ]


def main() -> None:
    options = parser(__doc__ or "", timed=False)
    options.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    options.add_argument("--folder", type=Path, default=RECORDED, help="where recorded runs are")
    options.add_argument(
        "--replay", action="store_true", help="the runs that are there, no new ones"
    )
    options.add_argument("--seconds", type=float, default=45.0, help="of a run, about")
    options.add_argument("--port", type=int, default=31700)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    args = options.parse_args()
    results, figures = {}, []
    args.folder.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        file = args.folder / f"{model}.jsonl"
        if not args.replay:
            run_pair(model, file, args)
        times, found = judge(file)
        print_times(times)
        show(model, found)
        figures += held(model, found)
        results[model] = {
            "times": msgspec.to_builtins(times),
            "runs": {
                run.name: [vars(each) | {"error": each.error} for each in rows]
                for run, rows in found
            },
        }
    finish(args, {"seed": args.seed, "models": results}, figures)


def show(model: str, found: Sequence[tuple[Run, list[Beside]]]) -> None:
    names = [each.name for each in found[0][1]]
    table(
        f"{model}: recorded / simulated, ms, requests/s",
        ("run", *names),
        [
            (
                run.name,
                *(
                    f"{each.real * unit:.4g} / {each.simulated * unit:.4g} {each.error:+.1%}"
                    for each in rows
                    for unit in [1 if each.name == "goodput" else 1e3]
                ),
            )
            for run, rows in found
        ],
    )


def held(model: str, found: Sequence[tuple[Run, list[Beside]]]) -> Iterator[Figure]:
    """The worst run of each figure."""
    for rows in zip(*(rows for _, rows in found), strict=True):
        name = rows[0].name
        worst = max(abs(each.error) for each in rows)
        target = TARGETS[name.split()[-1]]
        yield Figure(f"{model}: largest error of {name}", worst, target, at_least=False)


if __name__ == "__main__":
    main()
