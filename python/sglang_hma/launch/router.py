"""python -m sglang_hma.launch.router: SGLang's router behind an entry that loses nothing.

Takes the flags of sglang_router.launch_router. --host, --port and --tls-* are the entry's; the
router listens on 127.0.0.1. Both end together, and the entry as its router did.
"""

import argparse
import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from sglang_hma.entry.router_process import PARENT_ENV

LOOPBACK = "127.0.0.1"
# Below those of outgoing connections; not launch_pd's, whose servers take theirs after seconds.
PORTS = range(22100, 24990)
MAX_BODY = 256 << 20
# A carried request is a JSON string in a JSON object: six bytes at most for one.
MOST_GROWTH = 6
LAST_WORDS_S = 2
CHILD_ENDS_S = 5.0  # the router has no request left once the entry has answered its own


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The entry's flags, and what is the router's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--tls-cert-path")
    parser.add_argument("--tls-key-path")
    parser.add_argument("--api-key")
    parser.add_argument("--max-payload-size", type=int, default=MAX_BODY)
    parser.add_argument("--shutdown-grace-period-secs", type=int, default=180)
    return parser.parse_known_args(argv)


def free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((LOOPBACK, port))
            return port
    raise SystemExit(f"no free port in {PORTS.start}-{PORTS.stop - 1} for the router: stop some")


async def serve(given: argparse.Namespace, router: str, child: subprocess.Popen[bytes]) -> int:
    import uvicorn

    from sglang_hma.entry.proxy import Entry

    config = uvicorn.Config(
        Entry(router, given.max_payload_size, given.api_key),
        host=given.host,
        port=given.port,
        ssl_certfile=given.tls_cert_path,
        ssl_keyfile=given.tls_key_path,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_keep_alive=620,  # a client closes its connection first
        timeout_graceful_shutdown=given.shutdown_grace_period_secs,
    )
    server = uvicorn.Server(config)

    async def listen() -> None:
        with contextlib.suppress(SystemExit):  # see `stop`; and of a port that is taken
            await server.serve()

    serving = asyncio.ensure_future(listen())
    ended = asyncio.ensure_future(end_of(child.pid))
    await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        ended.cancel()
        return 0 if server.started else 1
    # The requests in flight are refused in words; one that does not take that is cut off.
    server.config.timeout_graceful_shutdown = LAST_WORDS_S
    server.should_exit = True
    await serving
    return child.wait() or 1


async def end_of(pid: int) -> None:
    """Until the child `pid` has ended; a thread that waits for it would outlive the loop."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def stop(number: int, frame: FrameType | None) -> None:
    """Also what uvicorn raises anew after it has served the last request."""
    raise SystemExit(0)


def die_of(number: int) -> int:
    """By the signal that killed the router, so that whoever watches this process sees which."""
    with contextlib.suppress(OSError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the router's own core is the one to read
    os.kill(os.getpid(), number)
    return 128 + number


def main(argv: Sequence[str] | None = None) -> int:
    given, rest = parse(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, "-m", "sglang_hma.entry.router_process"]
    if "-h" in rest or "--help" in rest:
        return subprocess.call([*command, "--help"])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    port = free_port()
    command += [*rest, "--host", LOOPBACK, "--port", str(port)]
    command += ["--max-payload-size", str(given.max_payload_size * MOST_GROWTH)]
    command += ["--shutdown-grace-period-secs", str(given.shutdown_grace_period_secs)]
    command += ["--api-key", given.api_key] if given.api_key else []
    child = subprocess.Popen(command, env=os.environ | {PARENT_ENV: str(os.getpid())})
    try:
        code = asyncio.run(serve(given, f"http://{LOOPBACK}:{port}", child))
        return code if code >= 0 else die_of(-code)
    finally:
        child.terminate()
        try:
            child.wait(CHILD_ENDS_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


if __name__ == "__main__":
    raise SystemExit(main())
