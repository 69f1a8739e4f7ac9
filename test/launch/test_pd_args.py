"""launch_pd's flags: what it refuses, and what it gives to servers and router."""

import argparse
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from sglang_hma import cluster_secret
from sglang_hma.launch.offload import CARDS
from sglang_hma.launch.pd_args import parse
from sglang_hma.launch_pd import PORT_POOL, Commands, main, plan
from sglang_hma.planner import catalogue

from .fleet import FAKE, free_port


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
        (["--max-restarts", "-1"], ["--max-restarts is -1", "0 for none"]),
        (["--restart-window", "0"], ["--restart-window is 0", "above 0"]),
        (["--hma-drain-timeout", "x"], ["--hma-drain-timeout", "'x'"]),
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
        (["--nccl-p", "1"], ["--nccl-port 1", "leave it out"]),
        (["--por", "1"], ["--port 1", "in full"]),
        (["--decode-args", "--disaggregation-m=prefill"], ["--disaggregation-mode prefill in"]),
        (["--decode-args", "--smg-grpc"], ["--smg-grpc-mode in --decode-args", "HTTP"]),
        (["--tp-size", "2", "--prefill-args", "--tp 4"], ["is 4 on prefill and 2 on decode"]),
        (["--decode-args", "--enable-mixed"], ["--enable-mixed-chunk does not go", "leave it out"]),
        (["--tp-size", "two"], ["--tp-size is two", "at least 1"]),
        (
            ["--hma-kv-format=native", "--decode-args", "--tensor-par=2"],
            ["--tp-size is 1 on prefill and 2 on decode", "cannot be cut"],
        ),
        (["--prefill-args", "--hma-device-ids x"], ["--hma-device-ids", "'x'"]),
        (["--decode-args", "--config a.yaml"], ["--config is a.yaml", "No such file"]),
        (["--decode-args", "--config a.yaml --config b.yaml"], ["more than once"]),
        (["--decode-args", "--hma-kv-format native"], ["bfp8 on prefill and native on decode"]),
        (["--prefill-args", "--page-size=64"], ["--page-size 64 does not go"]),
        (
            ["--hma-kv-format=native", "--prefill-args", "--page-size=64"],
            ["--page-size is 64 on prefill and 32 on decode"],
        ),
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


SECRET = Path("made-by-launch_pd")


def server_flags(command: Sequence[str]) -> list[str]:
    return list(command[len(Commands().server) :])


def planned(*argv: str) -> list[list[str]]:
    """Flags of the servers that launch_pd would start with `argv`."""
    options = parse(["--port", str(free_port()), *argv])
    servers, _ = plan(options, Commands(), SECRET)
    return [server_flags(server.command) for server in servers]


def last(flags: list[str], flag: str) -> str | None:
    """The value that counts."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    value: str | None = parser.parse_known_args(flags)[0].value
    return value


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (4, 1), (2, 2)])
def test_tensor_parallelism_that_transfer_can_cut(
    prefill: int, decode: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_key_value_heads": 4}))
    argv = ["--model-path", str(tmp_path), "--prefill-args", f"--tp {prefill}"]
    servers = planned(*argv, "--decode-args", f"--tensor-parallel-size={decode}")
    assert last(servers[0], "--tp") == str(prefill)
    assert last(servers[1], "--tensor-parallel-size") == str(decode)


def test_tensor_parallelism_that_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_key_value_heads": 4}))
    argv = ["--model-path", str(tmp_path), "--decode-args", "--tp 3"]
    assert "4 KV heads cannot be cut into 3" in refusal(argv, capsys)


def test_every_server_gets_one_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag, mine = "--hma-cluster-secret-file", tmp_path / "mine"
    cluster_secret.make(mine)
    servers = planned("--model-path", "a/b", "--prefill", "2")
    assert {last(server, flag) for server in servers} == {str(SECRET)}
    servers = planned("--model-path", "a/b", flag, str(mine))
    assert {last(server, flag) for server in servers} == {str(mine)}
    port = ["--model-path", "a/b", "--port", str(free_port())]
    message = refusal([*port, "--prefill-args", f"{flag} {mine}"], capsys)
    assert f"{flag} is {mine} on prefill and None on decode" in message
    message = refusal([*port, flag, str(tmp_path / "none")], capsys)
    assert "No such file" in message and "openssl rand" in message


def test_a_file_for_one_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "decode.yaml"
    file.write_text("model-path: a/b\ndisaggregation-mode: decode\ndp-size: 2\napi-key: secret\n")
    argv = ["--model-path", "a/b", "--decode-args", f"--config {file}"]
    prefill, decode = planned(*argv)
    # Data-parallel groups pick their ports themselves.
    assert last(prefill, "--nccl-port") is not None and last(decode, "--nccl-port") is None
    options = parse(["--port", str(free_port()), *argv])
    assert last(list(plan(options, Commands(), SECRET)[1].command), "--api-key") == "secret"
    message = refusal(["--model-path", "a/b", "--prefill-args", f"--config {file}"], capsys)
    assert "--disaggregation-mode decode in --prefill-args" in message
    file.write_text("port: 30001\n")
    message = refusal(["--model-path", "a/b", "--config", str(file)], capsys)
    assert "--port 30001" in message and "launch_pd's command line" in message


@pytest.mark.slow
def test_sglang_and_the_router_take_the_flags(tmp_path: Path) -> None:
    from sglang_router.launch_router import parse_router_args

    from sglang_hma.launch.arguments import assume, full_parser

    argv = ["--model-path", "a/b", "--port", str(free_port()), "--prefill", "2", "--decode", "2"]
    argv += ["--device", "cpu", "--hma-kv-format", "bfp8"]
    argv += ["--prefill-args", f"--enable-metrics --hma-trace {tmp_path}/trace.json"]
    argv += ["--decode-args", "--max-total-tokens 4096", "--router-args", "--log-level warn"]
    options = parse(argv)
    secret = tmp_path / "secret"
    cluster_secret.make(secret)
    servers, router = plan(options, Commands(), secret)
    parser = full_parser()
    ports: list[int] = []
    traces, bootstraps = [], []
    for server in servers:
        flags = server_flags(server.command)
        config, args = assume(flags), parser.parse_args(flags)
        assert config.role == args.disaggregation_mode == server.name.split("-")[0]
        assert args.model_path == "a/b" and args.host == "127.0.0.1"
        assert config.cluster_secret_file == str(secret)
        assert args.enable_metrics == (config.role == "prefill")
        assert args.max_total_tokens == (4096 if config.role == "decode" else None)
        ports += [args.port, args.nccl_port]
        if config.role == "prefill":
            ports.append(args.disaggregation_bootstrap_port)
            bootstraps.append(f"127.0.0.1:{args.disaggregation_bootstrap_port}")
            traces.append(config.trace)
        else:
            assert config.prefill_peers == tuple(bootstraps) and len(bootstraps) == 2
    assert traces == [f"{tmp_path}/trace.json", f"{tmp_path}/trace.prefill-1.json"]
    assert len(set(ports)) == len(ports) == 10 and set(ports) <= set(PORT_POOL)
    routes = parse_router_args(list(router.command[len(Commands().router) :]))
    assert routes.pd_disaggregation and routes.policy == "random" and routes.log_level == "warn"
    assert [port for _, port in routes.prefill_urls] == [ports[2], ports[5]]
    assert len(routes.decode_urls) == 2 and routes.port == options.port


@pytest.mark.parametrize("given", ["--hma-device-ids 0,3", "--hma-dev=0,3"])
def test_each_prefill_server_gets_its_card(given: str) -> None:
    servers = planned("--model-path", "a/b", "--prefill", "2", "--prefill-args", given)
    assert [last(flags, "--hma-device-ids") for flags in servers] == ["0", "3", None]


def test_prefill_servers_share_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model-path", "a/b", "--prefill", "2", "--prefill-args"]
    servers = planned(*argv, "--hma-device-ids 0,3,5,6")
    assert [last(flags, "--hma-device-ids") for flags in servers] == ["0,3", "5,6", None]
    with pytest.raises(SystemExit):
        planned(*argv, "--hma-device-ids 0,1,2")
    assert "2 prefill servers cannot share 3 cards" in capsys.readouterr().err


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What nvidia-smi says, a line a card."""
    said, tool = tmp_path / "gpus", tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\ncat "{said}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return said


@pytest.mark.parametrize(
    ("cards", "flags", "below"),
    [
        ("NVIDIA H100 80GB HBM3", [], "295"),
        ("NVIDIA H100 80GB HBM3\nNVIDIA A100-SXM4-80GB", [], "153"),
        ("NVIDIA H200\nNVIDIA Own 1", [], "0"),
        ("", [], "0"),
        ("NVIDIA H100 80GB HBM3", ["--decode-args", "--device cpu"], "0"),
    ],
)
def test_short_prompts_by_the_decode_card(
    cards: str, flags: list[str], below: str, gpus: Path
) -> None:
    gpus.write_text(cards)
    flag = "--hma-offload-threshold"
    prefill, decode = planned("--model-path", "a/b", flag, "auto", *flags)
    assert last(prefill, flag) == below and last(decode, flag) == "auto"
    prefill, _ = planned("--model-path", "a/b", "--prefill-args", f"{flag} 48")
    assert last(prefill, flag) == "48"


def test_a_tool_that_fails_is_no_card(gpus: Path) -> None:
    prefill, _ = planned("--model-path", "a/b", "--hma-offload-threshold", "auto")
    assert last(prefill, "--hma-offload-threshold") == "0"


def test_figures_of_cards_are_the_planners() -> None:
    cards = [card for card in catalogue.load().cards.values() if "bf16" in card.tflops]
    titles = {card.title: (card.tflops["bf16"].value, card.bandwidth_gb_s.value) for card in cards}
    for words, figures in CARDS.items():
        assert figures in [told for title, told in titles.items() if words in title], words


@pytest.mark.parametrize("given", ["--no-such-flag 3", "--log-level loud"])
def test_router_flags_are_refused_before_anything_starts(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--model-path", "a/b", "--port", str(free_port()), "--router-args", given])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--router-args: " in line and given.split()[0] in line
