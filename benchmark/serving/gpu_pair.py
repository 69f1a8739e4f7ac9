"""Prefill on the host's CPU, decode on a GPU: what comes out, and how fast.

    python -m benchmark.serving.gpu_pair --out OUT [--seconds 120] [--decode gpu gpu-triton cpu]

All servers start at once. Greedy tokens of prompts from the standard library's sources through each
pair, by its router where sglang_router is installed, are compared with transformers' and with each
other; all decode servers get the same bytes, because prefill keeps them. Then the time per token,
from streamed answers, and the part of a step that a GPU spends in decode attention. What is found
is printed at once, whatever fails later. Exit code 1 if a part failed.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmark.serving import gpu_trace
from benchmark.serving.greedy import Greedy, compare, prompts_of, transformers_greedy
from benchmark.serving.pd_servers import PdClient, Program, Router, Server

MODEL = Path(__file__).parents[1] / "quality/model"
TOKENS, LENGTHS = 24, [20 + 41 * i for i in range(20)]
CPU = ("--device", "cpu", "--max-total-tokens", "32768")
GPU = ("--device", "cuda", "--max-total-tokens", "65536", "--mem-fraction-static", "0.3")
DECODERS = {
    "gpu": (GPU, {}),
    "gpu-triton": (GPU, {"HMA_KERNELS": "triton"}),
    "cpu": (CPU, {}),
}
COMMON = (
    *("--disaggregation-transfer-backend", "mooncake_tcp", "--grammar-backend", "none"),
    "--skip-server-warmup",
)
PROFILED_STEPS = 20
STREAMS = ((1, 200, 128), (32, 200, 128))  # (at once, tokens of the prompt, tokens)


class Run:
    """`say` prints what is found; a part that fails says so, and the next one follows."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.began = out, time.monotonic()
        self.deadline = self.began + seconds
        self.servers: list[Program] = []
        self.failed = 0
        self.found: dict[str, list[Greedy]] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", flush=True)

    def left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def part(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.failed += 1
            causes = error.exceptions if isinstance(error, ExceptionGroup) else [error]
            self.say(f"{name}: FAILED: {'; '.join(repr(cause)[:300] for cause in causes)}")
            traceback.print_exc()

    def start(self, name: str, mode: str, flags: Sequence[str], env: dict[str, str]) -> Server:
        if flags is GPU and (site := os.environ.get("HMA_PAIR_CUDA_SITE")):
            env = env | {"PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"}
        server = Server(name, self.out / f"{name}.log", [*COMMON, *flags], env)
        self.servers.append(server.start(MODEL, mode))
        return server

    def client(self, prefill: Server, decode: Server) -> PdClient:
        if find_spec("sglang_router") is None:
            return PdClient(prefill, decode)
        name = decode.name.replace("decode", "router")
        router = Router(name, self.out / f"{name}.log", []).start(prefill, decode)
        self.servers.append(router)
        if not router.wait_ready(min(self.deadline, time.monotonic() + 20)):
            raise RuntimeError(f"{name} does not serve: {last_words(router.log)}")
        self.say(f"{name} is ready after {router.ready_s:.1f} s")
        return PdClient(prefill, decode, router)

    def greedy(self, client: PdClient, prompts: list[list[int]]) -> None:
        """One after the other: a batch of one on both sides."""

        async def all_answers() -> list[Greedy]:
            limit = min(40.0, self.left())
            return [Greedy.of(await client.answer(p, TOKENS, limit)) for p in prompts]

        answers = asyncio.run(asyncio.wait_for(all_answers(), min(40.0, self.left())))
        self.found[client.decode.name] = answers
        self.say(f"{client.decode.name}: {len(answers)} answers of {TOKENS} tokens")

    def speed(self, client: PdClient, prompt: list[int]) -> None:
        name = client.decode.name
        for at_once, length, tokens in STREAMS:
            prompts = [prompt[i : i + length] for i in range(at_once)]
            warm = min(tokens, 8)
            asyncio.run(client.streams(prompts, warm, min(30.0, self.left())))
            streams = asyncio.run(client.streams(prompts, tokens, min(30.0, self.left())))
            tpot = [1e3 * stream.tpot for stream in streams]
            ttft = [1e3 * stream.ttft for stream in streams]
            self.say(
                f"{name}: {at_once} at once, prompts of {length}: TPOT"
                f" {statistics.median(tpot):.2f} ms in the median, {max(tpot):.2f} at most;"
                f" TTFT {statistics.median(ttft):.0f} ms; {tokens} tokens each,"
                f" {sum(len(s.counts) for s in streams)} events"
            )

    def kernel_share(self, client: PdClient, prompt: list[int]) -> None:
        """Of steps in which the most requests are served at once."""
        name, (at_once, length, _) = client.decode.name, STREAMS[-1]
        folder = self.out / f"{name}-profile"
        gpu_trace.start(client.decode.url, folder, PROFILED_STEPS)
        prompts = [prompt[i : i + length] for i in range(at_once)]
        asyncio.run(client.streams(prompts, 2 * PROFILED_STEPS, min(30.0, self.left())))
        found = gpu_trace.shares(gpu_trace.wait(folder, min(20.0, self.left())))
        self.say(f"{name}, {at_once} at once: {found}")

    def stop(self) -> None:
        for server in self.servers:
            if not server.alive():
                self.failed += 1
                self.say(
                    f"{server.name} ended by itself, exit code {server.popen.returncode}: "
                    f"{last_words(server.log)}"
                )
            server.stop()


def last_words(log: Path) -> str:
    """The last error that a program's output names, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)(:|$)", line)]
    return " ".join(lines[starts[-1] if starts else -1 :])[:300] or "no word"


def reference(out: Path, lengths: list[int]) -> "subprocess.Popen[bytes]":
    """transformers' answers, in a process beside the servers that are starting."""
    command = [sys.executable, "-m", "benchmark.serving.gpu_pair", "--out", str(out), "--reference"]
    command += ["--lengths", *map(str, lengths)]
    with (out / "reference.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def serve(run: Run, decoders: list[str], lengths: list[int]) -> None:
    prefill = run.start("prefill", "prefill", CPU, {})
    servers = [run.start(f"decode-{name}", "decode", *DECODERS[name]) for name in decoders]
    beside = reference(run.out, lengths)
    try:
        measure(run, prefill, servers, beside, lengths)
    finally:
        run.stop()
        beside.kill()


def measure(
    run: Run,
    prefill: Server,
    servers: list[Server],
    beside: "subprocess.Popen[bytes]",
    lengths: list[int],
) -> None:
    from transformers import AutoTokenizer

    prompts = prompts_of(AutoTokenizer.from_pretrained(MODEL), [max(lengths), *lengths])
    long, prompts = prompts[0], prompts[1:]
    ready = [s for s in (prefill, *servers) if s.wait_ready(run.deadline - 35)]
    for server in ready:
        run.say(f"{server.name} is ready after {server.ready_s:.1f} s")
        run.part(server.name, lambda s=server: run.say(f"{s.name}: {s.info()}"))  # type: ignore[misc]
    if prefill not in ready:
        raise RuntimeError("the prefill server does not serve")
    clients: list[PdClient] = []
    for server in servers:
        if server in ready:
            run.part(
                f"{server.name}'s router",
                lambda s=server: clients.append(run.client(prefill, s)),  # type: ignore[misc]
            )
    if find_spec("sglang_router") is None:
        run.say("no sglang_router: each request goes to both halves")
    for client in clients:
        run.part(f"{client.decode.name} greedy", lambda c=client: run.greedy(c, prompts))  # type: ignore[misc]
    run.part("transformers", lambda: load_reference(run, beside))
    run.part("answers", lambda: judge(run))
    for client in clients:
        run.part(f"{client.decode.name} speed", lambda c=client: run.speed(c, long))  # type: ignore[misc]
    for client in clients:
        if client.decode.name != "decode-cpu":
            run.part(
                f"{client.decode.name} kernels",
                lambda c=client: run.kernel_share(c, long),  # type: ignore[misc]
            )


def load_reference(run: Run, beside: "subprocess.Popen[bytes]") -> None:
    beside.wait(min(20.0, run.left()))
    answers = json.loads((run.out / "reference.json").read_text())
    run.found["transformers"] = [Greedy(**answer) for answer in answers]


def judge(run: Run) -> None:
    names, differ = list(run.found), 0
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            text, wrong = compare(f"{name} and {other}", run.found[name], run.found[other])
            run.say(text)
            differ += wrong
    if differ:
        raise RuntimeError(f"{differ} differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--decode", nargs="+", choices=list(DECODERS), default=list(DECODERS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--reference", action="store_true", help="only transformers' answers")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.reference:
        from transformers import AutoTokenizer

        lengths = [max(args.lengths), *args.lengths]
        prompts = prompts_of(AutoTokenizer.from_pretrained(MODEL), lengths)[1:]
        answers = transformers_greedy(MODEL, prompts, TOKENS)
        (args.out / "reference.json").write_text(json.dumps([vars(a) for a in answers]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # servers end too
    run = Run(args.out, args.seconds)
    run.part("servers", lambda: serve(run, args.decode, args.lengths))
    if run.failed:
        raise SystemExit(f"{run.failed} parts failed")


if __name__ == "__main__":
    main()
