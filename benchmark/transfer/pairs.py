"""The pairs that are compared, each a prefill server, a decode server and a router on a Link."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.common import console
from benchmark.transfer.link import DECODE_IP, PREFILL_IP, Link, link
from sglang_hma.demo.random_model import make_random_model
from sglang_hma.launch.defaults import ROUTER_DEFAULTS

START_TIMEOUT_S = 900  # only to end a hang
MODEL = {"layers": 8, "hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 128}
PLAIN_CPU = Path(__file__).parents[2] / "test" / "stand_ins" / "plain_cpu"


def kv_elements(tokens: int) -> int:
    return tokens * MODEL["layers"] * 2 * MODEL["kv_heads"] * MODEL["head_dim"]


@dataclass(frozen=True)
class Kind:
    """One way to serve. `element_bytes` are those of a K or V element on the wire."""

    title: str
    module: str
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    element_bytes: float = 2.0


KINDS = {
    "stock": Kind(
        "SGLang 0.5.23, BF16, after the forward",
        "sglang.launch_server",
        (
            *("--device", "cpu", "--attention-backend", "torch_native", "--disable-cuda-graph"),
            *("--sampling-backend", "pytorch", "--sleep-on-idle"),
            *("--disaggregation-transfer-backend", "mooncake_tcp"),
        ),
        {
            "PYTHONPATH": str(PLAIN_CPU),
            "SGLANG_PLATFORM": "plain_cpu",
            "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
            "SGLANG_TIMEOUT_KEEP_ALIVE": "620",
        },
    ),
    "native": Kind(
        "ours, BF16, layer by layer",
        "sglang_hma.launch_server",
        ("--hma-kv-format", "native"),
    ),
    "after": Kind(
        "ours, BFP8, after the forward",
        "sglang_hma.launch_server",
        ("--hma-layers-per-send", "all"),
        element_bytes=17 / 16,
    ),
    "ours": Kind("ours, BFP8, layer by layer", "sglang_hma.launch_server", element_bytes=17 / 16),
}


@dataclass
class Running:
    """A started pair; `url` answers inside the prefill server's namespace."""

    kind: Kind
    url: str
    prefill_url: str
    trace: Path


@contextlib.contextmanager
def running(
    name: str,
    model: Path,
    link: Link,
    folder: Path,
    port: int,
    flags: list[str],
    decode_flags: Sequence[str] = (),
) -> Iterator[Running]:
    """Start one pair and wait until it has answered a request."""
    kind = KINDS[name]
    trace = folder / f"{name}.trace.json"
    env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "SGLANG_HMA_SHARE": "2"}
    common = ["--model-path", str(model), *kind.flags, *flags]
    traced = ["--hma-trace", str(trace)] if kind.module.startswith("sglang_hma") else []
    commands = {
        "prefill": [
            *("-m", kind.module, "--disaggregation-mode", "prefill", "--host", PREFILL_IP),
            *("--port", str(port), "--disaggregation-bootstrap-port", str(port + 1)),
            *(*common, *traced),
        ],
        "decode": [
            *("-m", kind.module, "--disaggregation-mode", "decode", "--host", DECODE_IP),
            *("--port", str(port), "--disaggregation-decode-retraction-backup", "cpu_tensor"),
            *(*common, *decode_flags),
        ],
        "router": [
            *("-m", "sglang_router.launch_router", "--pd-disaggregation", "--policy", "random"),
            *ROUTER_DEFAULTS,
            *("--host", PREFILL_IP, "--port", str(port + 2), "--prometheus-port", str(port + 3)),
            *("--prefill", f"http://{PREFILL_IP}:{port}", str(port + 1)),
            *("--decode", f"http://{DECODE_IP}:{port}"),
        ],
    }
    places = {"prefill": link.prefill, "decode": link.decode, "router": link.prefill}
    ips = {"prefill": PREFILL_IP, "decode": DECODE_IP, "router": PREFILL_IP}
    processes: list[subprocess.Popen[bytes]] = []
    url = f"http://{PREFILL_IP}:{port + 2}"
    try:
        for role, command in commands.items():
            log = folder / f"{name}-{role}.log"
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        link.inside(places[role], [sys.executable, *command]),
                        env=os.environ | env | kind.env | {"SGLANG_HOST_IP": ips[role]},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            if role != "prefill":
                wait(processes, link, folder, url if role == "router" else "", port)
        yield Running(kind, url, f"http://{PREFILL_IP}:{port}", trace)
    finally:
        stop(processes)


def wait(
    processes: list[subprocess.Popen[bytes]], link: Link, folder: Path, router: str, port: int
) -> None:
    """Until both servers are healthy, or until the router has workers."""
    urls = (
        [(link.prefill, f"{router}/readiness")]
        if router
        else [
            (link.prefill, f"http://{PREFILL_IP}:{port}/health"),
            (link.decode, f"http://{DECODE_IP}:{port}/health"),
        ]
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    for namespace, url in urls:
        while not link.call(namespace, lambda url=url: answers(url)):  # type: ignore[misc]
            if any(process.poll() is not None for process in processes):
                raise RuntimeError(f"a server ended while starting; logs: {folder}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} does not answer; logs: {folder}")
            time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=60):
            return True
    except OSError:
        return False


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, then the whole session of each: all of it was started here."""
    for process in reversed(processes):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + 8
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class Wanted:
    """A pair of a kind, and what its decode server is given beside."""

    kind: str
    decode_flags: tuple[str, ...] = ()


@contextlib.contextmanager
def on_a_link(
    port: int, wanted: Mapping[str, Wanted], flags: Sequence[str] = ()
) -> Iterator[tuple[Link, dict[str, Running]]]:
    """A link, and pairs on it that serve one random model in BF16, on ports from `port` on."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = folder / "model"
        make_random_model(model, max_position=8192, intermediate=512, **MODEL)
        road = stack.enter_context(link())
        common = ["--dtype", "bfloat16", "--chunked-prefill-size", "8192", "--enable-metrics"]
        common += ["--max-total-tokens", "24576", "--mem-fraction-static", "0.9", *flags]
        pairs = {}
        for index, (name, one) in enumerate(wanted.items()):
            console.print(f"starting {name}: {KINDS[one.kind].title}", style="dim")
            place = folder / str(index)
            place.mkdir()
            ports = port + 10 * index
            pair = running(one.kind, model, road, place, ports, common, one.decode_flags)
            pairs[name] = stack.enter_context(pair)
        yield road, pairs


def answered(url: str, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Seconds until the first token of a streamed answer, and all of its tokens."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    first, said = 0.0, []
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as reply:
        for line in reply:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                first = first or time.perf_counter() - begin
                answer = json.loads(line.removeprefix(b"data:"))
                if "error" in answer:
                    raise RuntimeError(line.decode(errors="replace")[:500])
                said = list(answer["output_ids"])
    if len(said) != tokens:
        raise RuntimeError(f"{len(said)} tokens came, not {tokens}")
    return first, said
