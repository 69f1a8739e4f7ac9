"""What `deploy` prints, read by the parsers of what it starts."""

import argparse
import json
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import pytest
from sglang_router.router_args import RouterArgs

from sglang_hma import launch_pd
from sglang_hma.launch import arguments, pd_args
from sglang_hma.launch.defaults import LIVE_ROUTER_DEFAULTS
from sglang_hma.planner import catalogue
from sglang_hma.planner.__main__ import main
from sglang_hma.planner.commands.deploy import DEPLOYABLE
from sglang_hma.planner.goodput import Goodput, Objectives
from sglang_hma.planner.model_shape import shape_of
from sglang_hma.planner.report import Comparison, as_json
from sglang_hma.planner.search import Answer
from sglang_hma.planner.systems import COLOCATED, SYSTEMS, Site, System, offer

ON_ONE_BOX = [name for name in DEPLOYABLE if name not in COLOCATED]


@cache
def server_parser() -> argparse.ArgumentParser:
    return arguments.full_parser()


def servers(lines: list[str]) -> Iterator[tuple[str, argparse.Namespace]]:
    """The role of each server's host, and its arguments."""
    for line in lines:
        host, command = line.split(" $ ")
        program, flags = shlex.split(command)[:3], shlex.split(command)[3:]
        if not program[2].endswith("router"):
            yield host.split("-")[0], server_parser().parse_args(flags)


def test_the_router_has_the_launchers_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main(["deploy", "--model-path", "/models/m"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.join(LIVE_ROUTER_DEFAULTS) in line


@pytest.mark.parametrize("system", DEPLOYABLE)
def test_every_line_is_understood(system: str, capsys: pytest.CaptureFixture[str]) -> None:
    router = argparse.ArgumentParser()
    RouterArgs.add_cli_args(router)
    main(
        f"deploy --model-path /models/m --system {system} --prefill 3 --decode 2 --hbm-cards 2 "
        "--gddr-cards 4".split()
    )
    *started, last = capsys.readouterr().out.splitlines()
    routes = router.parse_args(shlex.split(last)[5:])
    assert routes.port == 30000
    assert routes.pd_disaggregation == (system not in COLOCATED)
    roles = []
    for host, args in servers(started):
        assert args.model_path == "/models/m"
        assert args.enable_metrics
        roles.append((host, args.disaggregation_mode))
        on_cards = system in ("ours", "hetero-serial") and args.disaggregation_mode == "prefill"
        assert args.hma_device_ids == ((0, 1, 2, 3) if on_cards else None)
        assert args.tp_size == (1 if on_cards else 2)
        assert args.enable_mixed_chunk == (system == "colocated-mixed")
        takes = system not in COLOCATED and args.disaggregation_mode == "decode"
        named = [f"prefill-{index}:8998" for index in range(3)]
        assert args.hma_prefill_peers == (named if takes else None)
        assert (args.hma_cluster_secret_file is None) == (system in COLOCATED)
    prefills = 0 if system in COLOCATED else 3
    assert [host for host, _ in roles] == ["prefill"] * prefills + ["decode"] * 2
    if prefills:
        assert [mode for _, mode in roles] == ["prefill"] * 3 + ["decode"] * 2


@pytest.mark.parametrize(
    ("flags", "backend"),
    [
        ("--system ours", "mooncake_tcp"),
        ("--system ours --transfer rdma", "mooncake"),
        ("--system pd-bf16", "mooncake"),
        ("--system pd-bf16 --transfer tcp", "mooncake_tcp"),
    ],
)
def test_both_sides_have_one_transfer(
    flags: str, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(f"deploy --model-path /models/m {flags}".split())
    *started, _ = capsys.readouterr().out.splitlines()
    found = [args.disaggregation_transfer_backend for _, args in servers(started)]
    assert found == [backend, backend]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As far as launch_pd looks at one. Its logs go nowhere else."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "a model"
    folder.mkdir()
    config = {"num_attention_heads": 32, "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("system", ON_ONE_BOX)
def test_launch_pd_starts_the_line_of_one_box(
    system: str, model: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = Random(seed)
    hbm, gddr = draw.choice((1, 2, 4)), draw.choice((1, 2))
    heterogeneous = system in ("ours", "hetero-serial")
    prefills = draw.randint(1, 3) if heterogeneous else 1
    mix = f"--system {system} --prefill {prefills} --hbm-cards {hbm} --gddr-cards {gddr}".split()
    where = ["--format", "launch-pd", "--model-path", str(model)]
    main(["deploy", *where, "--gddr", "n300", *mix])
    program, *argv = shlex.split(capsys.readouterr().out)
    assert [program, *argv[:2]] == ["python", "-m", "sglang_hma.launch_pd"]
    argv = argv[2:]
    argv[argv.index("--port") + 1] = str(launch_pd.FreePorts().take())
    started, router = launch_pd.plan(pd_args.parse(argv), launch_pd.Commands(), model / "secret")
    launch_pd.check_router(list(router.command[3:]))
    cards: list[int] = []
    gpus: list[int] = []
    for each in started:
        args = server_parser().parse_args(each.command[3:])
        assert args.model_path == str(model)
        if args.hma_prefill_runtime == "ttnn":
            cards += args.hma_device_ids
            assert args.hma_mesh == 2 * gddr
            assert args.hma_layers_per_send == ("all" if system == "hetero-serial" else "auto")
        else:
            gpus += range(args.base_gpu_id, args.base_gpu_id + args.tp_size)
    assert sorted(cards) == list(range(prefills * gddr if heterogeneous else 0))
    assert sorted(gpus) == list(range(hbm if heterogeneous else 2 * hbm))
    assert len(started) == prefills + 1
    formats = {
        each.command[each.command.index("--hma-kv-format") + 1]
        for each in started
        if "--hma-kv-format" in each.command
    }
    assert formats == (set() if heterogeneous else {"native"})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--format launch-pd --system colocated", "not colocated ones"),
        ("--format launch-pd --decode 2", "2 decode instances: launch_pd gives each the same GPUs"),
        ("--format launch-pd --system pd-bf16 --prefill 2", "2 prefill instances of pd-bf16"),
        ("--gddr-cards 3", "--gddr-cards is 3"),
        ("--gddr n300 --gddr-cards 4", "with 2 chip(s) each"),
        ("--hbm-cards 3", "8 KV heads cannot be cut into 3 equal parts"),
        ("--chunk-tokens 100", "--chunk-tokens is 100: needs a multiple of 32"),
        ("--prefill 0", "--prefill is 0; needs 1 or more"),
        ("--from nothing.json", "--from is nothing.json: No such file"),
    ],
)
def test_what_cannot_start_is_one_line(flags: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"deploy --model-path org/m {flags}".split())
    message = str(ended.value)
    assert message.startswith("sglang_hma.planner: error: ")
    assert said in message
    assert "\n" not in message


SITE = Site(hbm="h100-sxm", gddr="n300", hbm_cards=2, link="200g")


@pytest.fixture
def compared(tmp_path: Path, seed: int) -> tuple[Path, dict[System, list[Answer]]]:
    """A file as compare writes it, with a rate for every mix, and the mixes."""
    draw, known, shape = Random(seed), catalogue.load(), shape_of("Qwen3-14B")
    answers = []
    for system in SYSTEMS:
        for _ in range(6):
            prefill = 0 if system in COLOCATED else draw.randint(1, 9)
            mix = offer(known, shape, SITE, system, prefill, draw.randint(1, 9))
            rate = draw.choice((0.0, draw.uniform(0.1, 9)))
            answers.append(Answer(mix, Goodput(rate, 0.0, (rate,), 1.0)))
        best = draw.uniform(9, 10)
        answers.append(Answer(mix, Goodput(best, 0.0, (best,), 1.0)))
    draw.shuffle(answers)
    file = tmp_path / "found.json"
    file.write_bytes(as_json(Comparison("Qwen3-14B", "t.csv", SITE, Objectives(2, 0.1), answers)))
    by_system: dict[System, list[Answer]] = {}
    for answer in answers:
        by_system.setdefault(answer.offer.system, []).append(answer)
    return file, by_system


@pytest.mark.parametrize("by", ["dollar", "goodput"])
@pytest.mark.parametrize("system", [*DEPLOYABLE, None])
def test_the_best_mix_of_a_comparison_is_deployed(
    by: str,
    system: System | None,
    compared: tuple[Path, dict[System, list[Answer]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, answers = compared
    able = [each for name in ([system] if system else DEPLOYABLE) for each in answers[name]]
    rates = [each.goodput.rate / (each.offer.price_usd if by == "dollar" else 1.0) for each in able]
    best = able[max(range(len(able)), key=rates.__getitem__)].offer
    chosen = ["--system", system] if system else []
    main(["deploy", "--from", str(file), "--by", by, "--model-path", "/models/m", *chosen])
    printed = capsys.readouterr().out
    named = ["--system", best.system, "--decode", str(best.decode), "--model", "Qwen3-14B"]
    named += ["--prefill", str(best.prefill)] if best.prefill else []
    named += ["--hbm", "h100-sxm", "--gddr", "n300", "--hbm-cards", "2", "--link", "200g"]
    main(["deploy", "--model-path", "/models/m", *named])
    assert printed == capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--prefill 2", "--prefill does not go with --from"),
        ("--hbm h200-sxm", "--hbm does not go with --from"),
        ("--model Qwen9", "model 'Qwen9' is no config.json"),
    ],
)
def test_what_the_file_says_is_not_said_again(
    flags: str, said: str, compared: tuple[Path, dict[System, list[Answer]]]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["deploy", "--from", str(compared[0]), "--model-path", "/models/m", *flags.split()])
    assert said in str(ended.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not what compare --json writes"),
        ("[]", "not what compare --json writes"),
        ('{"model": "Qwen3-8B", "site": {}, "mixes": []}', "no mix of any system keeps"),
        (
            '{"model": "m", "site": {}, "mixes": [{"system": "ours", "prefill": 0, "decode": 1, '
            '"goodput": {"rate": 1}, "per_thousand_usd": 1}]}',
            "ours with 0 prefill and 1 decode",
        ),
    ],
)
def test_a_file_that_is_no_comparison(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["deploy", "--from", str(file), "--model-path", "/models/m"])
    assert said in str(ended.value)
    assert "\n" not in str(ended.value)
