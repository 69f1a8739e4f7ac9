"""TTFT and TPOT of a prefill/decode pair, with the C++ kernels and with torch's.

Starts the pair that `make serve` starts, once a kind and round, turn about, and measures each with
sglang.bench_serving. Prompts are random ids, new in each round, so that no prefix is cached.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark.common import Timing, console, finish, parser, table

KINDS = {"torch": "portable", "C++": "cpu"}
METRICS = {"TTFT": "median_ttft_ms", "TPOT": "median_tpot_ms"}
START_TIMEOUT_S = 900  # only to end a hang


@contextmanager
def pair(model: Path, port: int, kernels: str, log: Path) -> Any:
    with log.open("w") as out:
        flags = ["--model-path", str(model), "--port", str(port)]
        flags += ["--log-dir", str(log.parent / log.stem)]
        server = subprocess.Popen(
            [sys.executable, "-m", "sglang_hma.launch_pd", *flags],
            env=os.environ | {"HMA_KERNELS": kernels},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/readiness", log)
        yield
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the servers ended while starting; their log: {log}")
        try:
            with urllib.request.urlopen(url, timeout=60):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"no server is ready after {START_TIMEOUT_S} s; their log: {log}")


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
    options.add_argument("--model", type=Path, default=Path("build/demo-model"))
    options.add_argument("--port", type=int, default=31500)
    options.add_argument("--input-len", type=int, default=1024, help="prompt tokens")
    options.add_argument("--output-len", type=int, default=64, help="generated tokens")
    options.add_argument("--num-prompts", type=int, default=16)
    options.add_argument("--concurrency", type=int, default=4)
    args = options.parse_args()
    if not (args.model / "config.json").is_file():
        options.error(f"--model is {args.model}: no model is there; `make demo-model` makes one")
    args.model = args.model.resolve()

    seconds: dict[str, dict[str, list[float]]] = {
        metric: {kind: [] for kind in KINDS} for metric in METRICS
    }
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.rounds):
            for kind, kernels in KINDS.items():
                console.print(f"round {index + 1} of {args.rounds}: {kind}", style="dim")
                log = Path(folder) / f"{kernels}-{index}.log"
                with pair(args.model, args.port, kernels, log):
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
