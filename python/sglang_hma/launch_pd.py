"""python -m sglang_hma.launch_pd: prefill servers, decode servers and a router on one box."""

import argparse
import json
import math
import os
import random
import shlex
import socket
import sys
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn

from sglang_hma import cluster_secret
from sglang_hma.config import SHARE_ENV
from sglang_hma.launch import run_folder
from sglang_hma.launch.addresses import LOOPBACK
from sglang_hma.launch.asking import direct
from sglang_hma.launch.defaults import LIVE_PATH, LIVE_ROUTER_DEFAULTS
from sglang_hma.launch.pd_args import Options, fail, parse
from sglang_hma.launch.program import Program
from sglang_hma.launch.supervisor import Fleet, FleetError

# Below the ports that the kernel gives to outgoing connections (32768 and up), above those
# that Mooncake draws from (15000-17000) and below SGLang's own random choice (22000-29999).
PORT_POOL = range(17100, 21990)
# What a server with --enable-dp-attention binds next to its --port (sglang 0.5.23, PortArgs
# and the data parallel controller).
DERIVED_PORTS = (13, *range(233, 250))
QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Commands:
    """What starts a server and the router, before their flags."""

    server: tuple[str, ...] = (sys.executable, "-m", "sglang_hma.launch_server")
    router: tuple[str, ...] = (sys.executable, "-m", "sglang_hma.launch.router")


class FreePorts:
    """Ports that were free when asked, none handed out twice."""

    def __init__(self, *taken: int) -> None:
        self._taken = set(taken)

    def take(self, *derived: int) -> int:
        """A port p such that p and every p + derived is free; all of them are taken then."""
        for port in random.sample(PORT_POOL, len(PORT_POOL)):
            block = {port, *(port + offset for offset in derived)}
            if self._taken.isdisjoint(block) and all(map(_is_free, block)):
                self._taken |= block
                return port
        fail(f"no free port in {PORT_POOL.start}-{PORT_POOL.stop - 1} for a server: stop some")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def url_of(host: str, port: int) -> str:
    """Where a client on this box reaches a server that listens on host:port."""
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def plan(options: Options, commands: Commands, secret: Path) -> tuple[list[Program], Program]:
    """The servers and the router, with ports. `secret`: a file for servers that were given none."""
    ports = FreePorts(options.port)
    env = child_env()
    share = env | {SHARE_ENV: str(sum(options.counts.values()))}
    servers: list[Program] = []
    routes: list[str] = []
    peers: list[str] = []  # prefill servers come first
    for role, number in options.counts.items():
        flags = [*options.shared, *options.role_args[role]]
        for i in range(number):
            port = ports.take(*DERIVED_PORTS)
            url = url_of(LOOPBACK, port)
            command = [*commands.server, "--model-path", options.model]
            command += ["--disaggregation-mode", role, "--host", LOOPBACK, "--port", str(port)]
            routes += [f"--{role}", url]
            if role == "prefill":
                bootstrap = str(ports.take())
                command += ["--disaggregation-bootstrap-port", bootstrap]
                routes.append(bootstrap)
                peers.append(f"{LOOPBACK}:{bootstrap}")
            else:
                command += ["--hma-prefill-peers", *peers]
            command += ["--hma-cluster-secret-file", str(secret)]
            # Data-parallel groups need a port each and pick them themselves.
            asked = options.asked[role]
            if asked.dp_size is None:
                command += ["--nccl-port", str(ports.take())]
            command += [*flags, *own_cards(asked, i, number)]
            command += own_trace(asked, f"{role}-{i}" if i else "")
            if role == "prefill" and options.offload is not None:
                command += ["--hma-offload-threshold", str(options.offload.below)]
            ready, alive = f"{url}/health", f"{url}{LIVE_PATH}"
            servers.append(Program(f"{role}-{i}", command, ready, alive, share, "importing SGLang"))
    router = [*commands.router, "--pd-disaggregation", "--policy", "random"]
    router += [*LIVE_ROUTER_DEFAULTS, *routes]
    router += ["--shutdown-grace-period-secs", str(max(1, math.ceil(drain_timeout(options))))]
    router += ["--host", options.host, "--port", str(options.port)]
    router += ["--prometheus-host", options.host, "--prometheus-port", str(ports.take())]
    key = api_key(options)
    router += ["--api-key", key] if key else []
    router_url = url_of(options.host, options.port)
    command = [*router, *options.router_args]
    # /readiness, unlike /health, waits until a prefill and a decode server are registered.
    ready, alive = f"{router_url}/readiness", f"{router_url}/liveness"
    return servers, Program("router", command, ready, alive, env, "connecting")


def drain_timeout(options: Options) -> float:
    return max(float(asked.hma_drain_timeout) for asked in options.asked.values())


def hang_timeout(options: Options) -> float:
    return max(float(asked.hma_hang_timeout) for asked in options.asked.values())


def own_cards(asked: argparse.Namespace, index: int, number: int) -> list[str]:
    """--hma-device-ids of the server's equal share, to stand behind the user's own."""
    cards = asked.hma_device_ids
    if cards is None or number == 1:
        return []
    each = len(cards) // number
    if len(cards) % number:
        fail(
            f"--hma-device-ids is {','.join(map(str, cards))}: {number} prefill servers cannot "
            f"share {len(cards)} cards evenly; change --prefill or the list"
        )
    return ["--hma-device-ids", ",".join(map(str, cards[index * each :][:each]))]


def own_trace(asked: argparse.Namespace, name: str) -> list[str]:
    """--hma-trace FILE for all but the first server of a role: FILE with `name` in it."""
    path = asked.hma_trace
    if not path or not name:
        return []
    return ["--hma-trace", str(Path(path).with_suffix(f".{name}{Path(path).suffix}"))]


def api_key(options: Options) -> str | None:
    key: str | None = options.asked["decode"].api_key
    return key


def child_env() -> dict[str, str]:
    """Logs line by line, and no proxy between processes of one box."""
    env = {"PYTHONUNBUFFERED": "1"}
    for name in ("no_proxy", "NO_PROXY"):
        env[name] = ",".join(filter(None, (os.environ.get(name), LOOPBACK, "localhost", "::1")))
    return env


def first_request(options: Options, decode_url: str) -> str:
    """A shell line with a request that has just been answered.

    Raises FleetError if neither a chat nor a completion nor token ids come through.
    """
    url, key = url_of(options.host, options.port), api_key(options)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    status, reply = request(f"{decode_url}/v1/models", headers, options.timeout)
    if status != 200:
        raise FleetError(f"{decode_url}/v1/models answers HTTP {status}: {reply[:300]}")
    model = json.loads(reply)["data"][0]["id"]
    # A base model has no chat template and refuses the first of these, and servers without a
    # tokenizer the second.
    asked = {"model": model, "max_tokens": 16, "temperature": 0}
    sampling = {"max_new_tokens": 16, "temperature": 0}
    prompts: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": QUESTION}], **asked},
        "/v1/completions": {"prompt": "The capital of France is", **asked},
        "/generate": {"input_ids": [1, 2, 3], "sampling_params": sampling},
    }
    refusals = []
    for path, fields in prompts.items():
        body = json.dumps(fields, separators=(",", ":"))
        status, reply = request(url + path, headers, options.timeout, body)
        if status == 200:
            return curl(url + path, body, key)
        refusals.append(f"{path} HTTP {status} {' '.join(reply.split())[:300]}")
    raise FleetError(f"a first request through {url} fails: {'; '.join(refusals)}")


def request(
    url: str, headers: dict[str, str], timeout: float, body: str | None = None
) -> tuple[int, str]:
    """Status and text of a GET, or of a POST if there is a body; status 0 for no reply."""
    data = body.encode() if body else None
    try:
        with direct.open(urllib.request.Request(url, data, headers), timeout=timeout) as reply:
            return reply.status, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except (OSError, HTTPException) as error:
        return 0, str(error)


def curl(url: str, body: str, key: str | None) -> str:
    """A shell line; the API key stays out of it."""
    secret = ' -H "Authorization: Bearer $API_KEY"' if key else ""
    json_type = "-H 'Content-Type: application/json'"
    return f"curl -s {shlex.quote(url)} {json_type}{secret} -d {shlex.quote(body)}"


class RouterParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"--router-args: {message}; see python -m sglang_router.launch_router --help")


def check_router(args: list[str]) -> None:
    """Refuse what the router would refuse when its servers are there at last."""
    from sglang_router.router_args import RouterArgs

    parser = RouterParser(add_help=False)
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    parser.parse_args(args)


def main(argv: list[str] | None = None, commands: Commands | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.offload is not None:
        print(f"--hma-offload-threshold is {options.offload.below}: {options.offload.because}")
    run_id = uuid.uuid4().hex
    secret = run_folder.path(run_id) / "cluster-secret"
    servers, router = plan(options, commands or Commands(), secret)
    if commands is None or commands.router == Commands().router:
        check_router(options.router_args)
    decode_url = servers[-1].ready_url.removesuffix("/health")
    fleet = Fleet(
        servers,
        router,
        lambda: first_request(options, decode_url),
        url=url_of(options.host, options.port),
        address=(options.host, options.port),
        run_id=run_id,
        timeout=options.timeout,
        log_dir=options.log_dir,
        restarts=options.restarts,
        drain_timeout=drain_timeout(options),
        hang_timeout=hang_timeout(options),
        verbose=options.verbose,
    )
    try:
        run_folder.make(run_id)
        cluster_secret.make(secret)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; set TMPDIR to a directory to write to")
    try:
        return fleet.run()
    finally:
        run_folder.remove(run_id)


if __name__ == "__main__":
    raise SystemExit(main())
