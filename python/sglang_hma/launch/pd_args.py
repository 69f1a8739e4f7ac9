"""The flags of launch_pd: what they are, and one-line refusals of what cannot work."""

import argparse
import contextlib
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sglang_hma.config import PAGE_TOKENS
from sglang_hma.launch.checks import flag_value
from sglang_hma.launch.logs import default_dir

LOOPBACK = "127.0.0.1"

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

what goes where:
  --host, --port     the router's; servers listen on 127.0.0.1 at free ports
  servers            --model-path, --disaggregation-mode, --host, --port, --nccl-port,
                     --disaggregation-bootstrap-port (prefill), then your flags
  router             --pd-disaggregation --policy random, the servers' URLs, --host, --port,
                     --prometheus-host, --prometheus-port, then --router-args
exit code: 0 after Ctrl-C or SIGTERM, 1 if a server or the router ended by itself, 2 for bad flags
"""

NOT_HERE = {
    "--disaggregation-mode": "launch_pd starts both roles itself",
    "--disaggregation-bootstrap-port": "launch_pd picks a free port for every prefill server",
    "--nccl-port": "launch_pd picks a free port for every server",
    "--dist-init-addr": "launch_pd serves from one box; use launch_server on each of several",
    "--nccl-init-addr": "launch_pd serves from one box; use launch_server on each of several",
    "--nnodes": "launch_pd serves from one box; use launch_server on each of several",
    "--node-rank": "launch_pd serves from one box; use launch_server on each of several",
    "--grpc-mode": "the router reaches the servers over HTTP",
    "--smg-grpc-mode": "the router reaches the servers over HTTP",
    "--ssl-keyfile": "the servers are on loopback; put a TLS proxy before the router",
    "--ssl-certfile": "the servers are on loopback; put a TLS proxy before the router",
}
NOT_FOR_ONE_ROLE = {
    "--model-path": "both roles serve the same model; give it once, outside",
    "--model": "both roles serve the same model; give --model-path once, outside",
    "--host": "servers listen on 127.0.0.1; give the router's --host outside",
    "--port": "launch_pd picks a free port for every server; give the router's --port outside",
}
NOT_FOR_THE_ROUTER = {
    "--host": "give it outside of --router-args",
    "--port": "give it outside of --router-args",
    "--pd-disaggregation": "launch_pd passes it",
    "--prefill": "launch_pd passes the URLs of its servers",
    "--decode": "launch_pd passes the URLs of its servers",
    "--worker-urls": "launch_pd passes the URLs of its servers",
    "--mini-lb": "the router runs without SGLang's debugging balancer",
    "--tls-cert-path": "put a TLS proxy before the router",
    "--tls-key-path": "put a TLS proxy before the router",
}
# (names, default, why both roles must agree)
SAME_ON_BOTH = (
    (
        ("--tp-size", "--tensor-parallel-size", "--tp"),
        "1",
        "a page is sent to one rank, so attention tensor parallelism must be equal",
    ),
    (("--hma-kv-format",), "bfp8", "decode reads the bytes that prefill wrote"),
    (("--page-size",), str(PAGE_TOKENS), "pages are sent whole"),
)


@dataclass(frozen=True)
class Options:
    """Validated arguments. `shared` goes to every server, before its role's own."""

    model: str
    host: str
    port: int
    counts: dict[str, int]
    role_args: dict[str, list[str]]
    router_args: list[str]
    shared: list[str]
    log_dir: Path
    verbose: bool
    timeout: float


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    sys.stderr.write(f"sglang_hma.launch_pd: error: {message}\n")
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument ").replace(": is ", " is ", 1) + "; see --help")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}: give a whole number of servers, at least 1")
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
    parser = Parser(
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
    role_args = {"prefill": ours.prefill_args, "decode": ours.decode_args}
    refuse("", shared, NOT_HERE)
    for role, args in role_args.items():
        refuse(f" in --{role}-args", args, NOT_HERE | NOT_FOR_ONE_ROLE)
    refuse(" in --router-args", ours.router_args, NOT_FOR_THE_ROUTER)
    check_same([*shared, *ours.prefill_args], [*shared, *ours.decode_args])
    check_model(ours.model_path)
    check_port(ours.host, ours.port)
    log_dir = ours.log_dir or default_dir(ours.port)
    make_log_dir(log_dir)
    return Options(
        model=ours.model_path,
        host=ours.host,
        port=ours.port,
        counts={"prefill": ours.prefill, "decode": ours.decode},
        role_args=role_args,
        router_args=ours.router_args,
        shared=shared,
        log_dir=log_dir,
        verbose=ours.verbose,
        timeout=ours.timeout,
    )


def make_log_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--log-dir is {path}: {error.strerror}; give a directory to write to")
    if not os.access(path, os.W_OK):
        fail(f"--log-dir is {path}: not writable; give a directory to write to")


def refuse(where: str, args: list[str], reasons: dict[str, str]) -> None:
    for flag, why in reasons.items():
        value = flag_value(args, flag)
        if value is not None:
            fail(f"{flag} {value}".strip() + f"{where}: {why}: leave it out")


def check_same(prefill: list[str], decode: list[str]) -> None:
    for names, default, why in SAME_ON_BOTH:
        values = []
        for args in (prefill, decode):
            given = [value for name in names if (value := flag_value(args, name)) is not None]
            values.append(given[-1] if given else default)
        if values[0] != values[1]:
            fail(
                f"{names[0]} is {values[0]} on prefill and {values[1]} on decode: {why}; "
                "give it once, outside of --prefill-args and --decode-args"
            )


def check_model(model: str) -> None:
    looks_like_path = model.startswith((".", os.sep)) or model.count(os.sep) > 1
    path = Path(model)
    if looks_like_path and not path.exists():
        fail(f"--model-path is {model}: no such directory; give a model directory or a hub name")
    if path.is_dir() and not (path / "config.json").exists():
        fail(f"--model-path is {model}: no config.json in it; give a model directory")


def check_port(host: str, port: int) -> None:
    try:
        families = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        fail(f"--host is {host}: {error.strerror}; give an address of this box")
    family, *_, address = families[0]
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(1)
        except OSError as error:
            fail(f"--port is {port} on --host {host}: {error.strerror}; give another one")
