"""launch_pd with fake servers: real processes, real signals, nothing left behind."""

import os
import signal
import subprocess
import sys
import uuid

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
    (guardian,) = run.pids("sglang_hma.launch.guardian")
    os.kill(guardian, signal.SIGKILL)
    run.wait_for("guardian process was killed; started again")
    assert run.pids("sglang_hma.launch.guardian") not in ([], [guardian])
    run.popen.kill()
    assert run.popen.wait(STUCK_S) == -signal.SIGKILL
    until(lambda: carrying(run.mark) == {})


@pytest.mark.parametrize("victim", ["prefill", "router"])
def test_one_dies_later(launch: Launch, victim: str) -> None:
    run = launch()
    run.wait_for("  stop: ")
    word = f"--disaggregation-mode {victim}" if victim == "prefill" else "fake_server.py router"
    (pid,) = run.pids(word)
    os.kill(pid, signal.SIGKILL)
    assert run.end() == 1
    (line,) = run.err.read_text().splitlines()
    name = "prefill-0" if victim == "prefill" else "router"
    assert line == (
        f"sglang_hma.launch_pd: error: {name} was killed by SIGKILL, so all stopped; "
        f"log: {run.logs}/{name}.log"
    )


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


@pytest.mark.slow
def test_real_router(launch: Launch) -> None:
    run = launch("--prefill", "2", "--api-key", "secret", driver="real-router")
    run.wait_for("  stop: ")
    printed_request(run)
    log = (run.logs / "router.log").read_text()
    assert "INFO" in log and "\033[" not in log
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
