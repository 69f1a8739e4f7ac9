"""launch_pd with fake servers: real processes, real signals, nothing left behind."""

import os
import re
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from sglang_hma.launch.guardian import kill_run, marked

from .fleet import STUCK_S, Launch, Run, carrying, send, until


def printed_request(run: Run) -> tuple[str, dict[str, object]]:
    """Send the curl line that launch_pd printed, as printed."""
    (line,) = [line for line in run.text().splitlines() if line.startswith("  try: ")]
    url, body, _ = send(line.removeprefix("  try: "))
    return url, body


def test_serves_and_stops(launch: Launch) -> None:
    run = launch(
        *["--decode", "2", "--decode-args", "--fake-orphans"],
        *["--prefill-args", "--fake-start-s 0.5", "--served-model-name", "it's mine"],
    )
    run.wait_for("  stop: ")
    url, body = printed_request(run)
    assert url == f"http://127.0.0.1:{run.port}/v1/chat/completions"
    assert body["model"] == "it's mine"
    for name in ("prefill-0", "decode-0", "decode-1"):
        mode = name.split("-")[0]
        log = (run.logs / f"{name}.log").read_text()
        assert f'"--disaggregation-mode", "{mode}"' in log and "share 3" in log
    assert "/v1/chat/completions" in (run.logs / "router.log").read_text()
    until(lambda: len(run.pids("fake::scheduler")) == 4)
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert run.err.read_text() == ""


def test_killed_launcher_leaves_nothing(launch: Launch) -> None:
    run = launch("--decode-args", "--fake-orphans --fake-deaf")
    run.wait_for("  stop: ")
    until(lambda: len(run.pids("fake::scheduler")) == 2)
    (secret,) = {
        Path(command.split("--hma-cluster-secret-file ")[1].split()[0])
        for command in carrying(run.mark).values()
        if "--hma-cluster-secret-file" in command
    }
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    (guardian,) = run.pids("sglang_hma.launch.guardian")
    os.kill(guardian, signal.SIGKILL)
    run.wait_for("guardian process was killed; started again")
    assert run.pids("sglang_hma.launch.guardian") not in ([], [guardian])
    run.popen.kill()
    assert run.popen.wait(STUCK_S) == -signal.SIGKILL
    until(lambda: carrying(run.mark) == {})
    assert not secret.parent.exists()


WORDS = {
    "prefill-0": "--disaggregation-mode prefill",
    "decode-0": "--disaggregation-mode decode",
    "router": "fake_server.py router",
}


@pytest.mark.parametrize("victim", ["prefill-0", "router"])
def test_one_dies_and_may_not_start_again(launch: Launch, victim: str) -> None:
    run = launch("--max-restarts", "0")
    run.wait_for("  stop: ")
    (pid,) = run.pids(WORDS[victim])
    os.kill(pid, signal.SIGKILL)
    assert run.end() == 1
    (line,) = run.err.read_text().splitlines()
    assert line == (
        f"sglang_hma.launch_pd: error: {victim} was killed by SIGKILL, so all stopped; "
        f"log: {run.logs}/{victim}.log"
    )


@pytest.mark.parametrize("victim", WORDS)
def test_one_dies_and_starts_again_on_its_ports(launch: Launch, victim: str) -> None:
    run = launch("--decode-args", "--fake-orphans")
    run.wait_for("  stop: ")
    (pid,) = run.pids(WORDS[victim])
    command = carrying(run.mark)[pid]
    os.kill(pid, signal.SIGKILL)
    run.wait_for(
        f"sglang-hma: {victim} was killed by SIGKILL; starts again in 1 s "
        f"(restart 1 of 5 in 600 s); log: {run.logs}/{victim}.log\n"
    )
    run.wait_for(f"sglang-hma: {victim} serves again (")
    (successor,) = run.pids(WORDS[victim])
    assert carrying(run.mark)[successor] == command and successor != pid
    # What the dead one had started is gone: it could hold the ports.
    until(lambda: len(run.pids("fake::scheduler")) == 2)
    printed_request(run)
    starts = [
        line for line in (run.logs / f"{victim}.log").read_text().splitlines() if "--- " in line
    ]
    assert len(starts) == 2 and str(pid) in starts[0] and str(successor) in starts[1]
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0 and run.err.read_text() == ""


def test_servers_restart_one_after_the_other_when_asked(launch: Launch) -> None:
    polite = ["--prefill-args", "--fake-polite", "--decode-args", "--fake-polite"]
    run = launch("--prefill", "2", "--max-restarts", "0", *polite)
    run.wait_for("  stop: ")
    before = set(carrying(run.mark))
    names = ["prefill-0", "prefill-1", "decode-0"]
    run.popen.send_signal(signal.SIGUSR1)
    run.wait_for("sglang-hma: decode-0 serves again (")
    lines = [line.partition(" (")[0] for line in run.lines() if "sglang-hma: " in line]
    said = ["restarts, as asked", "has ended as it was asked; starts again", "serves again"]
    expected = [f"sglang-hma: {name} {words}" for name in names for words in said]
    assert [line for line in lines if line in expected] == expected
    after = carrying(run.mark)
    assert len(before - set(after)) == len(names), "the router and the launcher go on"
    # No more is asked than what was: one of them that is killed still counts as dead.
    (pid,) = run.pids(WORDS["decode-0"])
    os.kill(pid, signal.SIGKILL)
    assert run.end() == 1


def test_one_dies_too_often(launch: Launch) -> None:
    run = launch("--max-restarts", "1")
    run.wait_for("  stop: ")
    for _ in range(2):
        until(lambda: run.pids(WORDS["decode-0"]))
        (pid,) = run.pids(WORDS["decode-0"])
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: run.popen.poll() is not None or pid not in carrying(run.mark))
    assert run.end() == 1
    (line,) = run.err.read_text().splitlines()
    assert line == (
        "sglang_hma.launch_pd: error: decode-0 was killed by SIGKILL, so all stopped after "
        f"restart 1 of 1 in 600 s; log: {run.logs}/decode-0.log"
    )


@pytest.mark.slow
def test_one_that_is_stopped_for_long_starts_again(launch: Launch) -> None:
    run = launch("--hma-hang-timeout", "3")
    run.wait_for("  stop: ")
    (pid,) = run.pids(WORDS["prefill-0"])
    os.kill(pid, signal.SIGSTOP)
    run.wait_for("sglang-hma: prefill-0 neither answers nor computes for 3 s: killed")
    run.wait_for("sglang-hma: prefill-0 serves again (")
    assert pid not in run.pids(WORDS["prefill-0"])


def test_nobody_reads(launch: Launch) -> None:
    """Servers that print without end, all of it shown, on a pipe that is full."""
    reader, writer = os.pipe()
    try:
        run = launch("--verbose", "--fake-flood", stdout=writer)
        os.close(writer)
        router = run.logs / "router.log"
        until(lambda: router.exists() and "POST /v1/chat/completions" in router.read_text())
        log = run.logs / "prefill-0.log"
        before = log.stat().st_size
        until(lambda: log.stat().st_size > before + (4 << 20))
        run.popen.send_signal(signal.SIGTERM)
        assert run.end() == 0
    finally:
        os.close(reader)


@contextmanager
def held_request(launch: Launch, hold: Path, *more: str) -> Iterator[tuple[Run, Future[Any]]]:
    """A fleet, and a request that decode answers when the file `hold` is gone."""
    run = launch("--decode-args", f"--fake-hold {hold}", *more, driver="real-router")
    run.wait_for("  stop: ")
    (line,) = [line for line in run.text().splitlines() if line.startswith("  try: ")]
    hold.touch()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(send, line.removeprefix("  try: "))
        until(lambda: "held" in (run.logs / "decode-0.log").read_text())
        yield run, asked


@pytest.mark.slow
def test_running_requests_finish_and_new_ones_are_refused(launch: Launch, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with held_request(launch, hold) as (run, asked):
        run.popen.send_signal(signal.SIGTERM)
        run.wait_for("sglang-hma stopping: requests that run have 60 s; a second Ctrl-C kills")
        # Decode answers it at once, where the router's socket is still open.
        url = f"http://127.0.0.1:{run.port}/v1/models"
        refusals: list[urllib.error.HTTPError] = []

        def refused() -> bool:
            try:
                urllib.request.urlopen(url, timeout=STUCK_S)
            except urllib.error.HTTPError as error:
                refusals.append(error)
            except OSError:  # between the router's socket and the launcher's
                pass
            return bool(refusals) and refusals[-1].headers["Retry-After"] is not None

        until(refused)
        assert refusals[-1].code == 503 and 0 < int(refusals[-1].headers["Retry-After"]) <= 60
        assert run.popen.poll() is None and not asked.done()
        hold.unlink()
        assert "choices" in asked.result()[2]
    assert run.end() == 0


@pytest.mark.slow
def test_router_keeps_a_busy_prefill_server(launch: Launch, tmp_path: Path) -> None:
    """One that answers no /health, as long as its forward pass takes, but tells that it lives."""
    busy = tmp_path / "busy"
    patience = "--health-check-interval-secs 1 --health-check-timeout-secs 1"
    run = launch(
        *["--prefill-args", f"--fake-busy {busy}", "--router-args", patience],
        driver="real-router",
    )
    run.wait_for("  stop: ")
    log = run.logs / "prefill-0.log"
    checks = re.compile(r'"GET /health(/live)? |^busy$', re.MULTILINE)
    before = len(checks.findall(log.read_text()))
    busy.touch()
    until(lambda: len(checks.findall(log.read_text())) > before + 6)  # three may fail
    printed_request(run)


@pytest.mark.slow
def test_second_signal_cuts_what_runs(launch: Launch, tmp_path: Path) -> None:
    with held_request(launch, tmp_path / "hold") as (run, asked):
        run.popen.send_signal(signal.SIGTERM)
        run.wait_for("sglang-hma stopping")
        until(lambda: run.popen.send_signal(signal.SIGTERM) or run.popen.poll() is not None)
        assert run.end() == 0
        assert isinstance(asked.exception(), OSError | HTTPException)


@pytest.mark.parametrize("whole_fleet", [True, False])
def test_the_killed_leave_no_semaphore(launch: Launch, whole_fleet: bool) -> None:
    run = launch("--prefill-args", "--fake-semaphore --fake-deaf", "--fake-orphans")
    run.wait_for("  stop: ")
    said = (run.logs / "prefill-0.log").read_text()
    (name,) = re.findall(r"^semaphore /(\S+)$", said, re.MULTILINE)
    left = Path(f"/dev/shm/sem.{name}")
    assert left.exists()
    if whole_fleet:
        run.popen.kill()
        until(lambda: carrying(run.mark) == {})
    else:
        run.popen.send_signal(signal.SIGINT)
        run.wait_for("sglang-hma stopping")
        until(lambda: run.popen.send_signal(signal.SIGINT) or run.popen.poll() is not None)
        run.end()
    assert not left.exists()


def test_second_interrupt_kills(launch: Launch) -> None:
    run = launch("--fake-deaf")
    run.wait_for("  stop: ")
    run.popen.send_signal(signal.SIGINT)
    run.wait_for("sglang-hma stopping")
    # One that comes within half a second is the same Ctrl-C, from a wrapper that forwards it.
    until(lambda: run.popen.send_signal(signal.SIGINT) or run.popen.poll() is not None)
    assert run.end() == 0
    stopping, killing, stopped = run.lines()[-3:]
    assert stopping.startswith("sglang-hma stopping")
    assert killing == "sglang-hma killing what is left"
    assert stopped == "sglang-hma stopped on SIGINT"


def test_hangup_while_starting_on_a_terminal(launch: Launch) -> None:
    run = launch("--fake-never-healthy", columns=80)
    run.wait_for("prefill-0, decode-0")
    run.popen.send_signal(signal.SIGHUP)
    assert run.end() == 0


def test_timeout_names_who_is_late(launch: Launch) -> None:
    for seconds in (1.5, 10, 100):  # the others need longer on a slow machine
        run = launch("--timeout", str(seconds), "--decode-args", "--fake-never-healthy")
        assert run.end() == 1
        (line,) = run.err.read_text().splitlines()
        if "prefill-0" not in line:
            break
    assert "decode-0" in line and "prefill-0" not in line and " not ready after" in line
    assert "--timeout" in line and str(run.logs) in line


def test_base_model_behind_a_key(launch: Launch) -> None:
    run = launch("--router-args", "--fake-no-chat", "--api-key", "secret")
    run.wait_for("  stop: ")
    assert "secret" not in run.text()
    url, body = printed_request(run)
    assert url.endswith("/v1/completions") and body["model"] == "the/model"


def test_servers_without_a_tokenizer(launch: Launch) -> None:
    run = launch("--router-args", "--fake-no-tokenizer")
    run.wait_for("  stop: ")
    url, body = printed_request(run)
    assert url.endswith("/generate") and body["input_ids"]


@pytest.mark.slow
def test_real_router(launch: Launch) -> None:
    run = launch("--prefill", "2", "--api-key", "secret", driver="real-router")
    run.wait_for("  stop: ")
    printed_request(run)
    log = (run.logs / "router.log").read_text()
    assert "INFO" in log and "\033[" not in log
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("host", ["::1", "::"])
def test_real_router_on_ipv6(launch: Launch, host: str) -> None:
    run = launch("--host", host, driver="real-router")
    run.wait_for("  stop: ")
    url, _ = printed_request(run)
    assert url.startswith("http://[::1]:")
    run.popen.send_signal(signal.SIGTERM)
    assert run.end() == 0


def test_only_the_run_is_killed() -> None:
    ours, other = uuid.uuid4().hex, uuid.uuid4().hex
    longer = f"{ours}0"
    sleepers = {
        run_id: subprocess.Popen(["sleep", "3600"], env=os.environ | marked(run_id))
        for run_id in (ours, longer, other)
    }
    try:
        kill_run(ours)
        assert sleepers[ours].wait() == -signal.SIGKILL
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
