"""launch_pd with input that is valid and seldom seen."""

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import requests

from .client import payload
from .harness import Process, free_port, until

pytestmark = pytest.mark.e2e

SMALL = ("--dtype", "float32", "--max-total-tokens", "4096")


def launcher(name: str, model: str, folder: Path, *flags: str) -> tuple[Process, int]:
    port, logs = free_port(), folder / name
    command = [sys.executable, "-m", "sglang_hma.launch_pd", "--model-path", model, "--port"]
    command += [str(port), "--log-dir", str(logs), *SMALL, *flags]
    return Process(name, command, folder / f"{name}.out").start(), port


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_two_launchers_at_once(model: Path, tmp_path: Path) -> None:
    """One on ::1 with a model whose folder has a space, and a slash at its end; one without a
    tokenizer, with a relative name."""
    spaced = tmp_path / "a model"
    shutil.copytree(model, spaced)
    host = "::1" if has_ipv6() else "127.0.0.1"
    first, one = launcher("first", f"{spaced}/", tmp_path, "--host", host)
    second, two = launcher("second", os.path.relpath(model), tmp_path, "--skip-tokenizer-init")
    try:
        url = f"http://[{host}]:{one}" if ":" in host else f"http://{host}:{one}"
        for process in (first, second):
            until(lambda process=process: "  stop: " in process.text(), process)
        said = [
            requests.post(f"{each}/generate", json=payload([5, 6, 7], 4)).json()["output_ids"]
            for each in (url, f"http://127.0.0.1:{two}")
        ]
        assert len(said[0]) == 4 and said[0] == said[1]
    finally:
        first.stop()
        second.stop()


def test_what_only_a_child_refuses(model: Path, tmp_path: Path) -> None:
    """The launcher's own last lines say why."""
    flags = ("--enable-lora", "--lora-paths", f"a={tmp_path / 'nowhere'}", "--max-restarts", "0")
    process, _ = launcher("refused", str(model), tmp_path, *flags)
    try:
        assert process.popen.wait() == 1
        assert "nowhere" in "\n".join(process.text().splitlines()[-12:])
    finally:
        process.stop()
