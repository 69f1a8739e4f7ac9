"""What `make serve` starts: launch_pd with real servers, in the model's own bfloat16."""

import random
import re
import signal
import sys
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


def test_one_command_serves_and_stops(pair: Pair, model: Path, logs: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "sglang_hma.launch_pd", "--model-path", str(model)]
    command += ["--port", str(port), "--log-dir", str(logs / "pd")]
    launcher = Process("launch-pd", command, logs / "launch-pd.log")
    launcher.start()
    try:
        ready = until(lambda: READY.search(launcher.text()), launcher)
        assert ready.group(1) == f"http://127.0.0.1:{port}"
        _, _, reply = send(ready.group(2))
        assert '"choices"' in reply
        prompt = list(range(100, 170))
        first = output_ids(ready.group(1), prompt, 8)
        assert len(first) == 8
        assert output_ids(ready.group(1), prompt, 8) == first
        rng = random.Random(5)
        prompts = [[rng.randrange(8, 4000) for _ in range(length)] for length in (1, 33, 100, 300)]
        assert_same_where_sure(ready.group(1), pair.url, prompts)
        # Neither the scheduler nor the detokenizer was spawned, to import SGLang once more.
        assert "multiprocessing" not in " ".join(carrying(launcher.run_id).values())
        launcher.popen.send_signal(signal.SIGTERM)
        assert launcher.popen.wait() == 0
        for name in ("prefill-0", "decode-0", "router"):
            log = (logs / "pd" / f"{name}.log").read_text()
            assert not OTHER_DEVICES.search(log)
            if name != "router":
                capacity = r"KV capacity: 65536 prompt tokens in BFP8 .* \d+ tokens in BF16"
                assert re.search(capacity, log)
        # Phases, the block, the end; nothing of the servers' own.
        assert all(line.startswith(("sglang-hma", "  ")) for line in launcher.text().splitlines())
    finally:
        launcher.stop()
