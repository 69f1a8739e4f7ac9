"""launch_pd with fake servers as a process of its own, its output in files."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sglang_hma

FAKE = Path(__file__).with_name("fake_server.py")
MARK = "SGLANG_HMA_TEST_RUN"
# A launcher that neither answers nor ends within this is stuck, however slow the machine.
STUCK_S = 600.0


def carrying(mark: str) -> dict[int, str]:
    """pid -> command line of every process with `mark` in its environment."""
    found = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and mark in (process / "environ").read_text():
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(process.name)] = command.strip()
    return found


def kill_carrying(mark: str) -> None:
    """SIGKILL every process with `mark` in its environment, until none is found."""
    empty_scans = 0
    while empty_scans < 3:  # a process inside execve shows no environment for a moment
        found = carrying(mark)
        empty_scans = 0 if found else empty_scans + 1
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.03)


def until(what: Callable[[], object], timeout: float = STUCK_S) -> None:
    """Wait until what() is true."""
    start = time.monotonic()
    while not what():
        assert time.monotonic() < start + timeout
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def send(curl: str) -> tuple[str, dict[str, Any], str]:
    """Send the request of a curl line as launch_pd prints it, without curl, which a box may lack:
    the URL, the body, the reply."""
    words = shlex.split(curl)
    assert words[:2] == ["curl", "-s"]
    headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
    headers = {name: value.replace("$API_KEY", "secret") for name, value in headers.items()}
    body = words[words.index("-d") + 1]
    request = urllib.request.Request(words[2], body.encode(), headers)
    with urllib.request.urlopen(request, timeout=STUCK_S) as reply:
        return words[2], json.loads(body), reply.read().decode()


@dataclass
class Run:
    """One fake_server.py launch_pd with its output in files."""

    popen: subprocess.Popen[bytes]
    port: int
    mark: str
    out: Path
    err: Path
    logs: Path

    def text(self) -> str:
        return self.out.read_bytes().decode()

    def lines(self) -> list[str]:
        """Of what it printed; on a terminal, what is left on the screen."""
        return screen(self.text())

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.text() or self.popen.poll() is not None)
        assert text in self.text(), self.text() + self.err.read_text()

    def pids(self, word: str) -> list[int]:
        return [pid for pid, command in carrying(self.mark).items() if word in command]

    def end(self) -> int:
        """The exit code, after a check that every process of the run is gone."""
        code = self.popen.wait(STUCK_S)
        assert carrying(self.mark) == {}
        return code

    def kill(self) -> None:
        kill_carrying(self.mark)
        self.popen.wait()


Launch = Callable[..., Run]


def start(
    folder: Path,
    args: Sequence[str],
    *,
    driver: str = "launch_pd",
    columns: int = 0,
    term: str = "xterm",
    stdout: int | None = None,
) -> Run:
    """A launcher whose stdout is a file, or a terminal that is `columns` wide."""
    port, mark = free_port(), f"{MARK}={uuid.uuid4().hex}"
    out, err, logs = folder / "out", folder / "err", folder / "logs"
    out.touch()
    name, _, value = mark.partition("=")
    command = [sys.executable, str(FAKE), driver, "--model-path", "the/model"]
    command += ["--port", str(port), "--log-dir", str(logs), *args]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    environment |= {name: value, "PYTHONPATH": str(Path(sglang_hma.__file__).parents[1])}
    with contextlib.ExitStack() as files:
        if columns:
            ours, stdout = pty.openpty()
            files.callback(os.close, stdout)
            fcntl.ioctl(stdout, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            threading.Thread(target=copy, args=(ours, out), daemon=True).start()
        elif stdout is None:
            stdout = files.enter_context(out.open("wb")).fileno()
        popen = subprocess.Popen(
            command,
            stdout=stdout,
            stderr=files.enter_context(err.open("wb")),
            # As from a terminal, even if these tests run under nohup.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            env=environment | {"TERM": term},
            start_new_session=True,
        )
    return Run(popen, port, mark, out, err, logs)


def copy(terminal: int, out: Path) -> None:
    """Until the other end is closed."""
    with out.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while data := os.read(terminal, 4096):
            file.write(data)
    os.close(terminal)


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after `text`, as far as a live line needs it."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif token == "\x1b[2K":
            rows[row] = ""
        elif token == "\x1b[1A":
            row -= 1
        elif token[0] != "\x1b":
            kept = rows[row].ljust(column)
            rows[row] = kept[:column] + token + kept[column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in rows if line.strip()]
