"""What launch_pd refuses, in one line each, before it starts anything.

Servers' flags are read by SGLang's rules (launch/flags.py), but without SGLang: to import it takes
longer than all else that launch_pd does. Each server reads its flags again, all of them.
"""

import argparse
import json
import os
import socket
from pathlib import Path

from sglang_hma import config as hma_config
from sglang_hma.config import PAGE_TOKENS
from sglang_hma.launch.checks import check_secret
from sglang_hma.launch.flags import Parser, Refusal, parser_of, read
from sglang_hma.tensor_parallel import refuse_sizes

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
# launch_pd's own flags, where it does not see them: shortened, or in a --config file.
NOT_SHORTENED = {
    "--model-path": "launch_pd needs it in full, on its command line",
    "--model": "launch_pd needs --model-path, on its command line",
    "--host": "the router's --host goes on launch_pd's command line, in full",
    "--port": "the router's --port goes on launch_pd's command line, in full",
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
# What launch_pd itself asks of a server's flags, by their names in sglang.srt.server_args.
ASKED = {
    "tp_size": ("--tp-size", "--tensor-parallel-size"),
    "dp_size": ("--dp-size", "--data-parallel-size"),
    "page_size": ("--page-size",),
    "api_key": ("--api-key",),
    "device": ("--device",),
}
SWITCHES = ("--grpc-mode", "--smg-grpc-mode", "--pd-disaggregation", "--mini-lb")


def servers_flags() -> Parser:
    """What launch_pd needs to know of a server's flags; SGLang's parser reads all of them later."""
    parser = parser_of()
    for field, names in ASKED.items():
        parser.add_argument(*names, dest=field)
    hma_config.add_cli_args(parser)
    return parser


def refuse(
    where: str, args: list[str], reasons: dict[str, str], same: dict[str, str] | None = None
) -> None:
    """Raise Refusal if `args` have a flag of `reasons`, however it is written, with another value
    than in `same`."""
    given = vars(
        read(
            parser_of(
                *(flag for flag in reasons if flag not in SWITCHES),
                switches=[flag for flag in reasons if flag in SWITCHES],
            ),
            args,
        )
    )
    for flag, why in reasons.items():
        value = given[flag.removeprefix("--").replace("-", "_")]
        if value not in (None, "false", (same or {}).get(flag)):
            shown = flag if flag in SWITCHES else f"{flag} {value}"
            raise Refusal(f"{shown}{where}: {why}: leave it out")


def check_pair(prefill: argparse.Namespace, decode: argparse.Namespace, heads: int | None) -> None:
    """Raise Refusal for flags that the two roles must agree on, and do not."""
    formats = prefill.hma_kv_format, decode.hma_kv_format
    once = "give it once, outside of --prefill-args and --decode-args"
    if formats[0] != formats[1]:
        raise Refusal(
            f"--hma-kv-format is {formats[0]} on prefill and {formats[1]} on decode: decode reads "
            f"the bytes that prefill wrote; {once}"
        )
    files = prefill.hma_cluster_secret_file, decode.hma_cluster_secret_file
    if files[0] != files[1]:
        raise Refusal(
            f"--hma-cluster-secret-file is {files[0]} on prefill and {files[1]} on decode: a "
            f"server with another secret is refused; {once}"
        )
    if files[0] is not None:
        check_secret(files[0])
    pages = tuple(given.page_size or str(PAGE_TOKENS) for given in (prefill, decode))
    if pages[0] != pages[1]:
        raise Refusal(
            f"--page-size is {pages[0]} on prefill and {pages[1]} on decode: pages are sent "
            f"whole; {once}"
        )
    sizes = whole("--tp-size", prefill.tp_size), whole("--tp-size", decode.tp_size)
    why = refuse_sizes(*sizes, page_format=formats[0], kv_heads=heads)
    if why is not None:
        raise Refusal(f"--tp-size is {sizes[0]} on prefill and {sizes[1]} on decode: {why}; {once}")


def whole(flag: str, text: str | None) -> int:
    if text is None:
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise Refusal(f"{flag} is {text}: give a whole number, at least 1")
    return int(text)


def kv_heads(model: str) -> int | None:
    """Of a model directory's config.json; None where it does not say, or for a hub name."""
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    config = config.get("text_config", config)
    heads = config.get("num_key_value_heads", config.get("num_attention_heads"))
    return heads if isinstance(heads, int) else None


def check_model(model: str) -> None:
    looks_like_path = model.startswith((".", os.sep)) or model.count(os.sep) > 1
    path = Path(model)
    if looks_like_path and not path.exists():
        raise Refusal(
            f"--model-path is {model}: no such directory; give a model directory or a hub name"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise Refusal(f"--model-path is {model}: no config.json in it; give a model directory")


def check_port(host: str, port: int) -> None:
    try:
        families = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Refusal(f"--host is {host}: {error.strerror}; give an address of this box") from None
    family, *_, address = families[0]
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(1)
        except OSError as error:
            raise Refusal(
                f"--port is {port} on --host {host}: {error.strerror}; give another one"
            ) from None
