"""The flags of launch_pd."""

import argparse
import contextlib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sglang_hma.config import Role
from sglang_hma.launch.addresses import LOOPBACK
from sglang_hma.launch.checks import check_early
from sglang_hma.launch.flags import Refusal, read
from sglang_hma.launch.logs import default_dir
from sglang_hma.launch.offload import Offload, offload_to
from sglang_hma.launch.pd_checks import (
    NOT_FOR_ONE_ROLE,
    NOT_FOR_THE_ROUTER,
    NOT_HERE,
    NOT_SHORTENED,
    check_model,
    check_pair,
    check_port,
    kv_heads,
    refuse,
    servers_flags,
)
from sglang_hma.launch.restarts import RestartPolicy

LOG_DIR_HELP = "one file each, NAME.log, rotated ($XDG_STATE_HOME/sglang-hma/logs/PORT)"

DESCRIPTION = """\
Serve one model from prefill and decode servers on this box, behind one OpenAI-compatible
port. Says where and how to ask when a first request went through, stops everything on Ctrl-C."""

EPILOG = """\
Any other flag is SGLang's or sglang-hma's (--hma-*) and goes to every server, see
python -m sglang_hma.launch_server --help. Flags for one role go into --prefill-args or
--decode-args, flags for the router into --router-args: each one quoted string.

examples:
  one prefill and one decode server, http://127.0.0.1:30000
    python -m sglang_hma.launch_pd --model-path Qwen/Qwen3-0.6B
  two decode servers, reachable from other machines, logs where you want them
    python -m sglang_hma.launch_pd --model-path ./model --decode 2 --host 0.0.0.0 --log-dir logs
  prefill on the CPU, decode on a GPU
    python -m sglang_hma.launch_pd --model-path ./model \\
      --prefill-args "--device cpu" --decode-args "--device cuda --mem-fraction-static 0.8"
  two Tenstorrent cards, a prefill server each (one server on both: without --prefill 2)
    python -m sglang_hma.launch_pd --model-path ./model --prefill 2 \\
      --prefill-args "--hma-prefill-runtime ttnn --hma-device-ids 0,1"
  a GPU for each role
    python -m sglang_hma.launch_pd --model-path ./model --decode-args "--base-gpu-id 1"
  the same pair without BFP8, as a baseline
    python -m sglang_hma.launch_pd --model-path ./model --hma-kv-format native

KV cache of a CPU server: 65,536 tokens or one whole context, within a fifth of the memory for all
servers together; --max-total-tokens N for more or less.

what goes where:
  --host, --port     the router's; servers listen on 127.0.0.1 at free ports
  servers            --model-path, --disaggregation-mode, --host, --port, --nccl-port,
                     --disaggregation-bootstrap-port (prefill), then your flags
  router             --pd-disaggregation --policy random, the servers' URLs, --host, --port,
                     --prometheus-host, --prometheus-port, --health-check-endpoint,
                     --shutdown-grace-period-secs, then --router-args
what ends:
  A server or the router that dies, or neither answers nor computes for --hma-hang-timeout, starts
  again with its ports, after 1 s, 2 s, 4 s and so on to 30 s.
  On SIGTERM to a server that one restarts, on SIGUSR1 each server, one after the other; both let
  running requests finish and tell the router before.
  After Ctrl-C or SIGTERM requests that run have --hma-drain-timeout to finish, new ones get 503;
  a second one kills.
exit code: 0 after Ctrl-C or SIGTERM, 1 if a server or the router died too often, 2 for bad flags
"""


@dataclass(frozen=True)
class Options:
    """Validated arguments. `shared` goes to every server, before its role's own."""

    model: str
    host: str
    port: int
    counts: dict[Role, int]
    role_args: dict[Role, list[str]]
    asked: dict[Role, argparse.Namespace]  # by role: see servers_flags
    router_args: list[str]
    shared: list[str]
    log_dir: Path
    verbose: bool
    timeout: float
    restarts: RestartPolicy
    offload: Offload | None  # of --hma-offload-threshold auto


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    sys.stderr.write(f"sglang_hma.launch_pd: error: {message}\n")
    raise SystemExit(2)


class OwnParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument ").replace(": is ", " is ", 1) + "; see --help")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}: give a whole number of servers, at least 1")
    return int(text)


def restarts(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"is {text}: give a whole number, 0 for none")
    return int(text)


def port_number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"is {text}: give a port, 1 to 65535")
    return int(text)


def seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"is {text}: give a number of seconds above 0")


def words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is {text}: {error}, quote it as a shell would") from None


def build_parser() -> argparse.ArgumentParser:
    parser = OwnParser(
        prog="python -m sglang_hma.launch_pd",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", "--model", required=True, metavar="M", help="directory or hub name")
    add("--host", default=LOOPBACK, help="the router's address (127.0.0.1)")
    add("--port", type=port_number, default=30000, help="the router's port (30000)")
    add("--prefill", type=count, default=1, metavar="N", help="prefill servers (1)")
    add("--decode", type=count, default=1, metavar="N", help="decode servers (1)")
    for name in ("prefill", "decode", "router"):
        text = f"flags for {'the router' if name == 'router' else f'{name} servers only'}"
        add(f"--{name}-args", type=words, default=[], metavar='"..."', help=text)
    add("--log-dir", type=Path, metavar="DIR", help=LOG_DIR_HELP)
    add("--verbose", action="store_true", help="show the output of servers and router too")
    add("--timeout", type=seconds, default=600.0, metavar="S", help="for the whole start (600)")
    text = "how often a server or the router that died may start again (5) ..."
    add("--max-restarts", type=restarts, default=5, metavar="N", help=text)
    text = "... within so many seconds; one more ends all, 0 at the first death (600)"
    add("--restart-window", type=seconds, default=600.0, metavar="S", help=text)
    return parser


def parse(argv: list[str]) -> Options:
    """Validate launch_pd's own arguments; exits with code 2 and one line if they are wrong."""
    quoted = ("--prefill-args", "--decode-args", "--router-args")
    joined: list[str] = []
    for arg in argv:
        # argparse takes a value that starts with "--" only in this form.
        if joined and joined[-1] in quoted:
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    ours, shared = build_parser().parse_known_args(joined)
    if shared and not shared[0].startswith("-"):
        fail(
            f"{shared[0]} belongs to no flag: give --prefill-args, --decode-args and "
            "--router-args one quoted string each"
        )
    role_args: dict[Role, list[str]] = {"prefill": ours.prefill_args, "decode": ours.decode_args}
    try:
        model = {"--model-path": ours.model_path, "--model": ours.model_path}
        refuse("", shared, NOT_HERE | NOT_SHORTENED, model)
        for role, args in role_args.items():
            own = model | {"--disaggregation-mode": role}
            refuse(f" in --{role}-args", args, NOT_HERE | NOT_FOR_ONE_ROLE, own)
        refuse(" in --router-args", ours.router_args, NOT_FOR_THE_ROUTER)
        asked = {role: read(servers_flags(), [*shared, *args]) for role, args in role_args.items()}
        for role, args in role_args.items():
            check_early(role, asked[role], [*shared, *args])
        check_model(ours.model_path)
        check_pair(asked["prefill"], asked["decode"], kv_heads(ours.model_path))
        check_port(ours.host, ours.port)
    except Refusal as refusal:
        fail(str(refusal))
    log_dir = ours.log_dir or default_dir(ours.port)
    make_log_dir(log_dir)
    return Options(
        model=ours.model_path,
        host=ours.host,
        port=ours.port,
        counts={"prefill": ours.prefill, "decode": ours.decode},
        role_args=role_args,
        asked=asked,
        router_args=ours.router_args,
        shared=shared,
        log_dir=log_dir,
        verbose=ours.verbose,
        timeout=ours.timeout,
        restarts=RestartPolicy(ours.max_restarts, ours.restart_window),
        offload=offload_to(asked) if asked["prefill"].hma_offload_threshold == "auto" else None,
    )


def make_log_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--log-dir is {path}: {error.strerror}; give a directory to write to")
    if not os.access(path, os.W_OK):
        fail(f"--log-dir is {path}: not writable; give a directory to write to")
