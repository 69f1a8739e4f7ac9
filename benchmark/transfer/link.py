"""Two network namespaces joined by a link of a chosen rate: a cluster of two on one box.

Needs root and iproute2. Rates are held by `tc tbf` in the direction prefill to
decode. No delay is added.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

PREFILL_IP, DECODE_IP = "10.77.0.1", "10.77.0.2"
DEVICE = "wire"
BURST = "256kb"
QUEUE = "50ms"


class LinkError(RuntimeError):
    """The link cannot be set up on this machine; the message says what to do."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise LinkError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Link:
    prefill: str  # namespaces
    decode: str

    def inside(self, namespace: str, command: list[str]) -> list[str]:
        """The command line that runs `command` in a namespace."""
        return ["ip", "netns", "exec", namespace, *command]

    def set_rate(self, bits_per_s: float | None) -> None:
        """Hold the way from prefill to decode to this rate; None is as fast as the kernel."""
        queue = ("dev", DEVICE, "root")
        if "tbf" in _run("tc", "-n", self.prefill, "qdisc", "show", "dev", DEVICE):
            _run("tc", "-n", self.prefill, "qdisc", "del", *queue)
        if bits_per_s is not None:
            limits = ("rate", f"{round(bits_per_s / 1e3)}kbit", "burst", BURST, "latency", QUEUE)
            _run("tc", "-n", self.prefill, "qdisc", "add", *queue, "tbf", *limits)

    def set_up(self, up: bool) -> None:
        """Pull or plug the cable at decode's end."""
        _run("ip", "-n", self.decode, "link", "set", DEVICE, "up" if up else "down")

    def call(self, namespace: str, function: Callable[[], Any]) -> Any:
        """Run a function in a thread that lives in a namespace."""

        def enter() -> None:
            with open(f"/run/netns/{namespace}") as handle:
                os.setns(handle.fileno(), os.CLONE_NEWNET)

        with ThreadPoolExecutor(1, initializer=enter) as pool:
            return pool.submit(function).result()

    def goodput(self, megabytes: float) -> float:
        """Bytes a second of one TCP stream from prefill to decode."""
        total, chunk = int(megabytes * 1e6), bytes(1 << 18)
        server = self.call(self.decode, lambda: socket.create_server((DECODE_IP, 0)))
        received = []

        def receive() -> None:
            connection, _ = server.accept()
            with connection:
                first = time.perf_counter()
                count = 0
                while data := connection.recv(1 << 20):
                    count += len(data)
                received.append(count / (time.perf_counter() - first))

        reader = threading.Thread(target=receive)
        reader.start()

        def send() -> None:
            with socket.create_connection((DECODE_IP, server.getsockname()[1])) as connection:
                for _ in range(0, total, len(chunk)):
                    connection.sendall(chunk)

        self.call(self.prefill, send)
        reader.join()
        server.close()
        return float(received[0])


def run(options: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], None]) -> None:
    """Parse and measure; a machine without a link ends in one line."""
    args = options.parse_args()
    try:
        measure(args)
    except LinkError as error:
        options.error(str(error))


@contextlib.contextmanager
def link() -> Iterator[Link]:
    """Namespaces with a veth pair between them, gone afterwards."""
    if os.geteuid() != 0:
        raise LinkError("network namespaces need root: run this benchmark as root")
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise LinkError("ip and tc are missing: apt-get install iproute2")
    names = [f"hma-{os.getpid()}-{role}" for role in ("prefill", "decode")]
    made = Link(*names)
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", names[0], "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE,
             "netns", names[1])  # fmt: skip
        for name, ip in zip(names, (PREFILL_IP, DECODE_IP), strict=True):
            _run("ip", "-n", name, "addr", "add", f"{ip}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", DEVICE, "up")
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
