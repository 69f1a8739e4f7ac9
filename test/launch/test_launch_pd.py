"""launch_pd with fake servers: real processes, real signals, nothing left behind."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from pathlib import Path

import pytest

from sglang_hma.launch.checks import flag_value
from sglang_hma.launch.guardian import kill_run, marked
from sglang_hma.launch.pd_args import parse
from sglang_hma.launch_pd import PORT_POOL, Commands, plan

from .fleet import FAKE, STUCK_S, Launch, Run, carrying, free_port, until


def printed_request(run: Run) -> tuple[str, dict[str, object]]:
    """Send the curl line that launch_pd printed, as printed."""
    (line,) = [line for line in run.text().splitlines() if line.startswith("  try: ")]
    words = shlex.split(line)[1:]
    assert words[:2] == ["curl", "-s"]
    headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
    headers = {name: value.replace("$API_KEY", "secret") for name, value in headers.items()}
    body = words[words.index("-d") + 1]
    request = urllib.request.Request(words[2], body.encode(), headers)
    with urllib.request.urlopen(request, timeout=STUCK_S) as reply:
        assert reply.status == 200
    return words[2], json.loads(body)


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
        f"sglang_hma.launch_pd: error: {name} ended by itself, killed by SIGKILL, so all stopped; "
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
    run = launch("--timeout", "1.5", "--decode-args", "--fake-never-healthy")
    assert run.end() == 1
    (line,) = run.err.read_text().splitlines()
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


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("sglang_hma.launch_pd: error: ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prefill", "0"], ["--prefill is 0", "at least 1"]),
        (["--decode", "two"], ["--decode is two"]),
        (["--port", "70000"], ["--port is 70000", "65535"]),
        (["--timeout", "-1"], ["--timeout is -1", "above 0"]),
        (["--host", "no.such.host.invalid"], ["--host is no.such.host.invalid"]),
        (["--prefill-args", "'open"], ["--prefill-args is 'open", "quot"]),
        (["--model-path", "./nowhere"], ["--model-path is ./nowhere", "hub name"]),
        (["--model-path", str(FAKE.parent)], ["--model-path", "config.json"]),
        (["--log-dir", str(FAKE / "logs")], ["--log-dir", "directory"]),
        (["stray"], ["stray", "--prefill-args"]),
        (["--disaggregation-mode", "decode"], ["--disaggregation-mode decode", "leave it out"]),
        (["--nccl-port=1"], ["--nccl-port 1", "leave it out"]),
        (["--decode-args", "--port 1"], ["--port 1 in --decode-args", "leave it out"]),
        (["--prefill-args", "--model-path x"], ["--model-path x in --prefill-args"]),
        (["--router-args", "--prefill http://a"], ["--prefill http://a in --router-args"]),
        (["--decode-args", "--tp-size 2"], ["--tp-size is 1 on prefill and 2 on decode"]),
        (["--tp-size", "2", "--prefill-args", "--tp 4"], ["is 4 on prefill and 2 on decode"]),
        (["--decode-args", "--hma-kv-format native"], ["bfp8 on prefill and native on decode"]),
        (["--prefill-args", "--page-size=64"], ["--page-size is 64 on prefill and 32 on decode"]),
    ],
)
def test_refusals(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(["--model-path", "a/b", "--port", str(free_port()), *argv], capsys)
    assert all(word in message for word in words), message


def test_port_in_use_and_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        message = refusal(["--model-path", "a/b", "--port", str(port)], capsys)
        assert f"--port is {port}" in message and "in use" in message
    assert "--model-path" in refusal([], capsys)


def test_help_is_fast_and_teaches() -> None:
    code = "import sys, sglang_hma.launch_pd as l\ntry: l.main(['--help'])\nfinally: "
    code += "assert not {'torch', 'sglang'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout and "--decode-args" in done.stdout


def server_flags(command: list[str]) -> list[str]:
    return list(command[len(Commands().server) :])


@pytest.mark.slow
def test_sglang_and_the_router_take_the_flags(tmp_path: Path) -> None:
    import argparse

    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.server_args import ServerArgs
    from sglang_router.launch_router import parse_router_args

    from sglang_hma import launch_server

    argv = ["--model-path", "a/b", "--port", str(free_port()), "--prefill", "2", "--decode", "2"]
    argv += ["--device", "cpu", "--hma-kv-format", "bfp8"]
    argv += ["--prefill-args", f"--enable-metrics --hma-trace {tmp_path}/trace.json"]
    argv += ["--decode-args", "--max-total-tokens 4096", "--router-args", "--log-level warn"]
    options = parse(argv)
    servers, router = plan(options, Commands())
    parser = argparse.ArgumentParser()
    add_attention_backend_choices(["hma"])  # as the plugin does
    ServerArgs.add_cli_args(parser)
    ports: list[int] = []
    traces = []
    for server in servers:
        config, rest = launch_server.parse(server_flags(list(server.command)))
        args = parser.parse_args(rest)
        assert config.role == args.disaggregation_mode == server.name.split("-")[0]
        assert args.model_path == "a/b" and args.host == "127.0.0.1"
        assert args.enable_metrics == (config.role == "prefill")
        assert args.max_total_tokens == (4096 if config.role == "decode" else None)
        ports += [args.port, args.nccl_port]
        if config.role == "prefill":
            ports.append(args.disaggregation_bootstrap_port)
            traces.append(config.trace)
    assert traces == [f"{tmp_path}/trace.json", f"{tmp_path}/trace.prefill-1.json"]
    assert len(set(ports)) == len(ports) == 10 and set(ports) <= set(PORT_POOL)
    routes = parse_router_args(list(router.command[len(Commands().router) :]))
    assert routes.pd_disaggregation and routes.policy == "random" and routes.log_level == "warn"
    assert [port for _, port in routes.prefill_urls] == [ports[2], ports[5]]
    assert len(routes.decode_urls) == 2 and routes.port == options.port


@pytest.mark.parametrize("given", ["--hma-device-ids 0,3", "--hma-device-ids=0,3"])
def test_each_prefill_server_gets_its_card(given: str) -> None:
    argv = ["--model-path", "a/b", "--port", str(free_port()), "--prefill", "2"]
    servers, _ = plan(parse([*argv, "--prefill-args", given]), Commands())
    cards = [flag_value(list(server.command), "--hma-device-ids") for server in servers]
    assert cards == ["0", "3", None]


def test_prefill_servers_share_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model-path", "a/b", "--port", str(free_port()), "--prefill", "2"]
    servers, _ = plan(parse([*argv, "--prefill-args", "--hma-device-ids 0,3,5,6"]), Commands())
    cards = [flag_value(list(server.command), "--hma-device-ids") for server in servers]
    assert cards == ["0,3", "5,6", None]
    with pytest.raises(SystemExit):
        plan(parse([*argv, "--prefill-args", "--hma-device-ids 0,1,2"]), Commands())
    assert "2 prefill servers cannot share 3 cards" in capsys.readouterr().err
