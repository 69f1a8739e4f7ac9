"""What `make serve` starts: launch_pd with real servers, in the model's own bfloat16."""

import json
import random
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..launch.fleet import carrying, send
from .client import assert_same_where_sure, output_ids
from .harness import Pair, Process, free_port, until

pytestmark = pytest.mark.e2e

READY = re.compile(
    r"^sglang-hma ready: (\S+) .*\n  try: +(curl .*)\n(?:.*\n)*  stop: ", re.MULTILINE
)
OTHER_DEVICES = re.compile(r"AWQ|GGUF|Triton is not|torchao|numactl")


@contextmanager
def served(model: Path, logs: Path, name: str) -> Iterator[tuple[Process, str, str]]:
    """launch_pd once it is ready; its URL, and the reply to the request that it printed."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_hma.launch_pd", "--model-path", str(model)]
    command += ["--port", str(port), "--log-dir", str(logs / name)]
    launcher = Process(name, command, logs / f"{name}.log")
    launcher.start()
    try:
        ready = until(lambda: READY.search(launcher.text()), launcher)
        url, curl = ready.groups()
        assert url == f"http://127.0.0.1:{port}"
        _, _, reply = send(curl)
        assert '"choices"' in reply
        yield launcher, url, reply
        if launcher.alive():
            launcher.popen.send_signal(signal.SIGTERM)
        assert launcher.popen.wait() == 0
        assert not carrying(launcher.run_id), "servers are left"
    finally:
        launcher.stop()


def test_one_command_serves_and_stops(pair: Pair, model: Path, logs: Path) -> None:
    with served(model, logs, "launch-pd") as (launcher, url, _):
        prompt = list(range(100, 170))
        first = output_ids(url, prompt, 8)
        assert len(first) == 8
        assert output_ids(url, prompt, 8) == first
        rng = random.Random(5)
        prompts = [[rng.randrange(8, 4000) for _ in range(length)] for length in (1, 33, 100, 300)]
        assert_same_where_sure(url, pair.url, prompts)
        # Neither the scheduler nor the detokenizer was spawned, to import SGLang once more.
        assert "multiprocessing" not in " ".join(carrying(launcher.run_id).values())
        launcher.popen.send_signal(signal.SIGTERM)
        assert launcher.popen.wait() == 0
        for name in ("prefill-0", "decode-0", "router"):
            log = (logs / "launch-pd" / f"{name}.log").read_text()
            assert not OTHER_DEVICES.search(log)
            if name != "router":
                capacity = r"KV capacity: 65536 prompt tokens in BFP8 .* \d+ tokens in BF16"
                assert re.search(capacity, log)
        # Phases, the block, the end; nothing of the servers' own.
        assert all(line.startswith(("sglang-hma", "  ")) for line in launcher.text().splitlines())


def test_the_demo_answers(smollm2_folder: Path, logs: Path) -> None:
    with served(smollm2_folder, logs, "launch-demo") as (_, _, reply):
        (choice,) = json.loads(reply)["choices"]
        assert choice["message"]["content"] == "The capital of France is Paris."
