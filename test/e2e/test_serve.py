"""What `make serve` starts: launch_pd with real servers, in the model's own bfloat16."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..launch.fleet import carrying
from .harness import Process, free_port, output_ids

pytestmark = pytest.mark.e2e

READY = re.compile(
    r"^sglang-hma ready: (\S+) .*\n  try: +(curl .*)\n(?:.*\n)*  stop: ", re.MULTILINE
)
OTHER_DEVICES = re.compile(r"AWQ|GGUF|Triton is not|torchao|numactl")


def test_one_command_serves_and_stops(model: Path, logs: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "sglang_hma.launch_pd", "--model-path", str(model)]
    command += ["--port", str(port), "--log-dir", str(logs / "pd")]
    launcher = Process("launch-pd", command, logs / "launch-pd.log")
    launcher.start()
    try:
        ready = wait_ready(launcher)
        assert ready.group(1) == f"http://127.0.0.1:{port}"
        printed = subprocess.run(ready.group(2), shell=True, capture_output=True, text=True)
        assert '"choices"' in printed.stdout, printed.stdout + printed.stderr
        prompt = list(range(100, 170))
        first = output_ids(ready.group(1), prompt, 8)
        assert len(first) == 8
        assert output_ids(ready.group(1), prompt, 8) == first
        # Neither the scheduler nor the detokenizer was spawned, to import SGLang once more.
        assert "multiprocessing" not in " ".join(carrying(launcher.run_id).values())
        launcher.popen.send_signal(signal.SIGTERM)
        assert launcher.popen.wait(60) == 0
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


def wait_ready(launcher: Process) -> re.Match[str]:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            found = READY.search(launcher.text())
            if found:
                return found
        assert launcher.alive(), launcher.text()[-4000:]
        time.sleep(0.5)
    raise AssertionError(launcher.text()[-4000:])
