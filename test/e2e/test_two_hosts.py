"""docs/deployment.md, two hosts: its commands and its firewall, between two network namespaces."""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.transfer.link import DECODE_IP, PREFILL_IP, LinkError, link

from .harness import Process, until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="the firewall needs nft"),
]

PAGE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
HOSTS = {"10.0.0.11": PREFILL_IP, "10.0.0.12": DECODE_IP}
TIMED_OUT = 28  # curl's exit code
SMALL = ["--dtype", "float32", "--max-total-tokens", "2048"]


def block(name: str) -> str:
    """The code that follows a mark on the page, with the addresses of the namespaces."""
    (found,) = re.findall(rf"<!-- {name} -->\n```\n(.*?)```", PAGE, re.DOTALL)
    for written, real in HOSTS.items():
        found = found.replace(written, real)
    return str(found)


def commands() -> list[tuple[str, list[str]]]:
    """(host, command) of each line."""
    lines = block("commands").replace("\\\n", " ").splitlines()
    return [(host, shlex.split(words)) for host, words in (line.split("$ ", 1) for line in lines)]


def as_kubernetes_mounts(folder: Path) -> Path:
    """A secret that is a link through a link, which its group may read."""
    (folder / "..2026").mkdir(parents=True)
    (folder / "..data").symlink_to("..2026")
    (folder / "secret").symlink_to("..data/secret")
    (folder / "secret").write_text(secrets.token_hex(32))
    (folder / "secret").chmod(0o440)
    return folder / "secret"


def test_two_hosts(model: Path, tmp_path: Path) -> None:
    secret = as_kubernetes_mounts(tmp_path / "sglang-hma")
    put = {"/models/Qwen3-8B": str(model), "/etc/sglang-hma/secret": str(secret)}
    prefill, decode, router, curl = [
        (host, [put.get(word, word) for word in words]) for host, words in commands()
    ]
    started: list[Process] = []
    try:
        with link() as road:
            spaces = {PREFILL_IP: road.prefill, DECODE_IP: road.decode}
            for space in spaces.values():
                rules = road.inside(space, ["nft", "-f", "-"])
                subprocess.run(rules, input=block("firewall"), text=True, check=True)

            def inside(host: str, words: list[str]) -> list[str]:
                python = [sys.executable, *words[1:]] if words[0] == "python" else words
                return road.inside(spaces[host], python)

            def start(name: str, host: str, words: list[str], *more: str) -> Process:
                command = inside(host, [*words, *more])
                started.append(Process(name, command, tmp_path / f"{name}.log").start())
                return started[-1]

            def answers(host: str, url: str) -> bool:
                ask = [
                    "curl",
                    "-s",
                    "--max-time",
                    "60",
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code}",
                    url,
                ]
                asked = subprocess.run(inside(host, ask), capture_output=True, text=True)
                return asked.stdout == "200"

            one = start("two-hosts-prefill", *prefill, *SMALL)
            two = start("two-hosts-decode", *decode, *SMALL)
            until(lambda: answers(DECODE_IP, f"http://{PREFILL_IP}:30001/health"), one, two)
            until(lambda: answers(DECODE_IP, f"http://{DECODE_IP}:30002/health"), one, two)
            three = start("two-hosts-router", *router, "--prometheus-port", "29000")
            until(lambda: answers(PREFILL_IP, f"http://{DECODE_IP}:30000/readiness"), three)
            asked = subprocess.run(inside(*curl), capture_output=True, text=True, check=True)
            answer = json.loads(asked.stdout)
            assert answer["usage"]["completion_tokens"] == 16, asked.stdout
            # What the page does not name is for its own host alone.
            for port in (29000, 30002):
                url = f"http://{DECODE_IP}:{port}/metrics"
                reach = ["curl", "-s", "--connect-timeout", "2", "-o", "/dev/null", url]
                assert subprocess.run(inside(DECODE_IP, reach)).returncode == 0
                assert subprocess.run(inside(PREFILL_IP, reach)).returncode == TIMED_OUT
    except LinkError as error:
        pytest.skip(str(error))
    finally:
        for each in reversed(started):
            each.stop()
