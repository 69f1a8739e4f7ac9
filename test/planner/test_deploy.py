"""What `deploy` prints, read by the parsers of what it starts."""

import argparse
import shlex

import pytest
from sglang_router.router_args import RouterArgs

from sglang_hma.launch import arguments
from sglang_hma.planner.__main__ import main
from sglang_hma.planner.commands.deploy import DEPLOYABLE


@pytest.mark.parametrize("system", DEPLOYABLE)
def test_every_line_is_understood(system: str, capsys: pytest.CaptureFixture[str]) -> None:
    router = argparse.ArgumentParser()
    RouterArgs.add_cli_args(router)
    main(
        f"deploy --model-path /models/m --system {system} --prefill 3 --decode 2 --hbm-cards 2 "
        "--gddr-cards 4".split()
    )
    roles = []
    for line in capsys.readouterr().out.splitlines():
        host, command = line.split(" $ ")
        program, flags = shlex.split(command)[:3], shlex.split(command)[3:]
        if program[2] == "sglang_router.launch_router":
            routes = router.parse_args(flags)
            assert routes.port == 30000
            assert routes.pd_disaggregation == (system != "colocated")
            continue
        args = arguments.full_parser().parse_args(flags)
        assert args.model_path == "/models/m"
        roles.append((host.split("-")[0], args.disaggregation_mode))
        on_cards = system in ("ours", "hetero-serial") and args.disaggregation_mode == "prefill"
        assert args.hma_device_ids == ((0, 1, 2, 3) if on_cards else None)
        assert args.tp_size == (1 if on_cards else 2)
    prefills = 0 if system == "colocated" else 3
    assert [host for host, _ in roles] == ["prefill"] * prefills + ["decode"] * 2
    if prefills:
        assert [mode for _, mode in roles] == ["prefill"] * 3 + ["decode"] * 2
