"""What `make serve` starts: launch_pd with real servers, in the model's own bfloat16."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .harness import Process, free_port, output_ids

pytestmark = pytest.mark.e2e

READY = re.compile(r"sglang-hma ready: (\S+)  try: (curl .*)")


def test_one_command_serves_and_stops(model: Path, logs: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "sglang_hma.launch_pd", "--model-path", str(model)]
    launcher = Process("launch-pd", [*command, "--port", str(port)], logs / "launch-pd.log")
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
        text = launcher.text()
        assert "[prefill-0] " in text and "[decode-0] " in text and "[router] " in text
        assert re.search(r"KV capacity: \d+ prompt tokens in BFP8 .* \d+ tokens in BF16", text)
        launcher.popen.send_signal(signal.SIGTERM)
        assert launcher.popen.wait(60) == 0
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
