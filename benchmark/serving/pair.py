"""The pair that `make serve` starts, for as long as a benchmark needs it."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 900  # only to end a hang


@contextmanager
def pair(
    model: Path,
    port: int,
    log: Path,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """launch_pd once it is ready: its URL. What the servers say goes to a folder beside `log`."""
    command = [sys.executable, "-m", "sglang_hma.launch_pd", "--model-path", str(model)]
    command += ["--port", str(port), "--log-dir", str(log.parent / log.stem), *flags]
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=os.environ | (env or {}), stdout=out, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(server, f"{url}/readiness", log)
        yield url
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
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
