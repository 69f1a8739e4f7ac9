"""python -m sglang_hma.launch.router: SGLang's router behind an entry that loses nothing.

Takes the flags of sglang_router.launch_router. --host, --port and --tls-* are the entry's; the
router listens on 127.0.0.1. Both end together.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

LOOPBACK = "127.0.0.1"
PORTS = range(17100, 21990)  # as launch_pd's: below those of outgoing connections
MAX_BODY = 256 << 20
# A carried request is a JSON string in a JSON object: six bytes at most for one.
MOST_GROWTH = 6


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The entry's flags, and what is the router's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--tls-cert-path")
    parser.add_argument("--tls-key-path")
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
        Entry(router, given.max_payload_size),
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
    serving = asyncio.ensure_future(server.serve())
    ended = asyncio.ensure_future(asyncio.to_thread(child.wait))
    await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        return 0
    server.should_exit = server.force_exit = True
    await serving
    return child.returncode or 1


def main(argv: Sequence[str] | None = None) -> int:
    given, rest = parse(sys.argv[1:] if argv is None else argv)
    if "-h" in rest or "--help" in rest:
        return subprocess.call([sys.executable, "-m", "sglang_hma.entry.router_process", "--help"])
    port = free_port()
    command = [sys.executable, "-m", "sglang_hma.entry.router_process", *rest]
    command += ["--host", LOOPBACK, "--port", str(port)]
    command += ["--max-payload-size", str(given.max_payload_size * MOST_GROWTH)]
    command += ["--shutdown-grace-period-secs", str(given.shutdown_grace_period_secs)]
    child = subprocess.Popen(command)
    try:
        return asyncio.run(serve(given, f"http://{LOOPBACK}:{port}", child))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGTERM)
        child.wait()


if __name__ == "__main__":
    raise SystemExit(main())
