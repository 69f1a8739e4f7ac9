"""TTFT and TPOT of a prefill/decode pair, with the C++ kernels and with torch's.

Starts the pair that `make serve` starts, once a kind and round, turn about, and measures each with
sglang.bench_serving. Prompts are random ids, new in each round, so that no prefix is cached.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark.common import Timing, console, finish, parser, table
from benchmark.serving.pair import pair

KINDS = {"torch": "portable", "C++": "cpu"}
METRICS = {"TTFT": "median_ttft_ms", "TPOT": "median_tpot_ms"}


def bench_serving(args: Any, port: int, seed: int, output: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "sglang.bench_serving"]
    options = {
        "backend": "sglang",
        "host": "127.0.0.1",
        "port": port,
        "model": args.model,
        "tokenizer": args.model,
        "dataset-name": "random-ids",
        "random-range-ratio": 1,
        "random-input-len": args.input_len,
        "random-output-len": args.output_len,
        "num-prompts": args.num_prompts,
        "max-concurrency": args.concurrency,
        "warmup-requests": args.concurrency,
        "seed": seed,
        "output-file": output,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(output.read_text().splitlines()[-1])
    if result["completed"] != args.num_prompts:
        raise RuntimeError(f"{result['completed']} of {args.num_prompts} requests succeeded")
    return result


def main() -> None:
    options = parser(__doc__ or "")
    options.set_defaults(rounds=3)
    options.add_argument("--model", type=Path, default=Path("build/random-model"))
    options.add_argument("--port", type=int, default=31500)
    options.add_argument("--input-len", type=int, default=1024, help="prompt tokens")
    options.add_argument("--output-len", type=int, default=64, help="generated tokens")
    options.add_argument("--num-prompts", type=int, default=16)
    options.add_argument("--concurrency", type=int, default=4)
    args = options.parse_args()
    if not (args.model / "config.json").is_file():
        make = f"python -m sglang_hma.demo_model --random {args.model}"
        options.error(f"--model is {args.model}: no model is there; `{make}` makes one")
    args.model = args.model.resolve()

    seconds: dict[str, dict[str, list[float]]] = {
        metric: {kind: [] for kind in KINDS} for metric in METRICS
    }
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.rounds):
            for kind, kernels in KINDS.items():
                console.print(f"round {index + 1} of {args.rounds}: {kind}", style="dim")
                log = Path(folder) / f"{kernels}-{index}.log"
                with pair(args.model, args.port, log, env={"HMA_KERNELS": kernels}):
                    result = bench_serving(args, args.port, index + 1, log.with_suffix(".jsonl"))
                for metric, field in METRICS.items():
                    seconds[metric][kind].append(result[field] / 1e3)
    rows, report = [], {}
    for metric, kinds in seconds.items():
        before, after = (Timing(kinds[kind]) for kind in KINDS)
        ratio = after.times_faster_than(before)
        cells = [f"{t.median * 1e3:.0f} ({min(t.rounds) * 1e3:.0f}-{max(t.rounds) * 1e3:.0f})"
                 for t in (before, after)]  # fmt: skip
        rows.append([metric, *cells, f"{ratio:.1f}"])
        report[metric] = {"torch_s": before.rounds, "cpp_s": after.rounds, "ratio": ratio}
    table(
        f"{args.input_len} prompt tokens, {args.output_len} generated, {args.concurrency} at a "
        f"time; median (range) of {args.rounds} rounds",
        ["ms", *KINDS, "torch / C++"],
        rows,
    )
    finish(args, {"serving": report}, [])


if __name__ == "__main__":
    main()
