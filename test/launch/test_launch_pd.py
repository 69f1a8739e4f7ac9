"""launch_pd with fake servers: real processes, real signals, nothing left behind."""

import contextlib
import json
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sglang_hma
from sglang_hma.launch.guardian import kill_run, marked

FAKE = Path(__file__).with_name("fake_server.py")
MARK = "SGLANG_HMA_TEST_RUN"


def carrying(mark: str) -> dict[int, str]:
    """pid -> command line of every process with `mark` in its environment."""
    found = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and mark in (process / "environ").read_text():
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(process.name)] = command.strip()
    return found


def until(what: Callable[[], object], timeout: float = 15.0) -> float:
    """Wait until what() is true; the seconds that it took."""
    start = time.monotonic()
    while not what():
        assert time.monotonic() < start + timeout
        time.sleep(0.05)
    return time.monotonic() - start


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Run:
    """One fake_server.py launch_pd with its output in files."""

    popen: subprocess.Popen[bytes]
    port: int
    mark: str
    out: Path
    err: Path

    def text(self) -> str:
        return self.out.read_text()

    def wait_for(self, text: str, timeout: float = 15.0) -> None:
        until(lambda: text in self.text() or self.popen.poll() is not None, timeout)
        assert text in self.text(), self.text() + self.err.read_text()

    def pids(self, word: str) -> list[int]:
        return [pid for pid, command in carrying(self.mark).items() if word in command]

    def end(self, timeout: float = 15.0) -> int:
        """The exit code, after a check that every process of the run is gone."""
        code = self.popen.wait(timeout)
        assert carrying(self.mark) == {}
        return code


Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    runs: list[Run] = []

    def start(*args: str, driver: str = "launch_pd", stdout: int | None = None) -> Run:
        port, mark = free_port(), f"{MARK}={uuid.uuid4().hex}"
        out, err = tmp_path / f"{len(runs)}.out", tmp_path / f"{len(runs)}.err"
        package = str(Path(sglang_hma.__file__).parents[1])
        name, _, value = mark.partition("=")
        command = [sys.executable, str(FAKE), driver, "--model-path", "the/model"]
        with out.open("wb") as out_file, err.open("wb") as err_file:
            popen = subprocess.Popen(
                [*command, "--port", str(port), *args],
                stdout=out_file if stdout is None else stdout,
                stderr=err_file,
                # As from a terminal, even if these tests run under nohup.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
                env=os.environ | {name: value, "PYTHONPATH": package},
                start_new_session=True,
            )
        runs.append(Run(popen, port, mark, out, err))
        return runs[-1]

    yield start
    for run in runs:
        for pid in carrying(run.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.popen.wait()


def printed_request(text: str) -> tuple[str, dict[str, object]]:
    """Send the curl line that launch_pd printed, as printed."""
    words = shlex.split(text.partition("try: ")[2])
    assert words[:2] == ["curl", "-s"]
    headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
    headers = {name: value.replace("$API_KEY", "secret") for name, value in headers.items()}
    body = words[words.index("-d") + 1]
    request = urllib.request.Request(words[2], body.encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert reply.status == 200
    return words[2], json.loads(body)


def ready_line(run: Run) -> str:
    lines = [line for line in run.text().splitlines() if line.startswith("sglang-hma ready")]
    assert len(lines) == 1
    return lines[0]


def test_serves_and_stops(launch: Launch, tmp_path: Path) -> None:
    logs = tmp_path / "logs" / "new"
    run = launch(
        *["--decode", "2", "--log-dir", str(logs), "--decode-args", "--fake-orphans"],
        *["--prefill-args", "--fake-start-s 0.5", "--served-model-name", "it's mine"],
    )
    run.wait_for("sglang-hma ready")
    line = ready_line(run)
    assert line.startswith(f"sglang-hma ready: http://127.0.0.1:{run.port}  try: curl -s ")
    url, body = printed_request(line)
    assert url.endswith("/v1/chat/completions") and body["model"] == "it's mine"
    for name in ("prefill-0", "decode-0", "decode-1"):
        mode = name.split("-")[0]
        log = (logs / f"{name}.log").read_text()
        assert f'"--disaggregation-mode", "{mode}"' in log and "share 3" in log
        assert all(f"[{name}] {text}" in run.text() for text in log.splitlines()[:2])
    assert "/v1/chat/completions" in (logs / "router.log").read_text()
    until(lambda: len(run.pids("fake::scheduler")) == 4)
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert run.text().splitlines()[-1] == "sglang-hma stopped on SIGTERM"
    assert run.err.read_text() == ""


def test_killed_launcher_leaves_nothing(launch: Launch) -> None:
    run = launch("--decode-args", "--fake-orphans --fake-deaf")
    run.wait_for("sglang-hma ready")
    until(lambda: len(run.pids("fake::scheduler")) == 2)
    (guardian,) = run.pids("sglang_hma.launch.guardian")
    os.kill(guardian, signal.SIGKILL)
    until(lambda: run.pids("sglang_hma.launch.guardian") not in ([], [guardian]))
    run.popen.kill()
    assert run.popen.wait(5) == -signal.SIGKILL
    print(f"all gone after {until(lambda: carrying(run.mark) == {}, 5):.2f} s")


def test_server_dies_while_starting(launch: Launch) -> None:
    run = launch("--decode-args", "--fake-never-healthy --fake-die-s 0.2 --fake-orphans")
    assert run.end() == 1
    lines = run.err.read_text().splitlines()
    assert lines[0] == "last 20 lines of decode-0:"
    assert lines[1:-1] == [f"  dying line {i}" for i in range(10, 30)]
    assert lines[-1].endswith("decode-0 ended while starting, exit code 7; stopping the others")
    assert "sglang-hma ready" not in run.text()


@pytest.mark.parametrize("victim", ["prefill", "router"])
def test_one_dies_later(launch: Launch, victim: str) -> None:
    run = launch()
    run.wait_for("sglang-hma ready")
    word = f"--disaggregation-mode {victim}" if victim == "prefill" else "fake_server.py router"
    (pid,) = run.pids(word)
    os.kill(pid, signal.SIGKILL)
    assert run.end() == 1
    (line,) = run.err.read_text().splitlines()
    name = "prefill-0" if victim == "prefill" else "router"
    assert line.endswith(f"{name} ended by itself, killed by SIGKILL; stopping the others")


def test_second_interrupt_kills(launch: Launch) -> None:
    run = launch("--fake-deaf")
    run.wait_for("sglang-hma ready")
    run.popen.send_signal(signal.SIGINT)
    run.popen.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.popen.poll() is None
    run.popen.send_signal(signal.SIGINT)
    assert run.end(timeout=4) == 0


def test_hangup_while_starting_on_a_terminal(launch: Launch) -> None:
    ours, theirs = pty.openpty()
    run = launch("--fake-never-healthy", stdout=theirs)
    os.close(theirs)
    shown = b""
    while b"(1 s)" not in shown:
        shown += os.read(ours, 4096)
    assert b"sglang-hma: waiting for prefill-0, decode-0 (1 s)" in shown
    assert b"\r\033[K" in shown
    run.popen.send_signal(signal.SIGHUP)
    assert run.end() == 0
    os.close(ours)


def test_timeout_names_who_is_late(launch: Launch) -> None:
    run = launch("--timeout", "1.5", "--decode-args", "--fake-never-healthy")
    assert run.end() == 1
    (line,) = run.err.read_text().splitlines()
    assert "decode-0 not ready after" in line and "--timeout" in line


def test_base_model_behind_a_key(launch: Launch) -> None:
    run = launch("--router-args", "--fake-no-chat", "--api-key", "secret")
    run.wait_for("sglang-hma ready")
    assert "secret" not in ready_line(run)
    url, body = printed_request(ready_line(run))
    assert url.endswith("/v1/completions") and body["model"] == "the/model"


@pytest.mark.slow
def test_real_router(launch: Launch) -> None:
    run = launch("--prefill", "2", "--api-key", "secret", driver="real-router")
    run.wait_for("sglang-hma ready", 60)
    printed_request(ready_line(run))
    assert "[router] " in run.text() and "\033[" not in run.text()
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_only_the_run_is_killed() -> None:
    ours, other = uuid.uuid4().hex, uuid.uuid4().hex
    longer = f"{ours}0"
    sleepers = {
        run_id: subprocess.Popen(["sleep", "60"], env=os.environ | marked(run_id))
        for run_id in (ours, longer, other)
    }
    try:
        kill_run(ours)
        assert sleepers[ours].wait(5) == -signal.SIGKILL
        assert sleepers[longer].poll() is None and sleepers[other].poll() is None
    finally:
        for sleeper in sleepers.values():
            sleeper.kill()
            sleeper.wait()


def test_help_is_fast_and_teaches() -> None:
    code = "import sys, sglang_hma.launch_pd as l\ntry: l.main(['--help'])\nfinally: "
    code += "assert not {'torch', 'sglang'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout and "--decode-args" in done.stdout
