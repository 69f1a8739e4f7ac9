"""Stand-ins for an SGLang server and the router, and a launch_pd that starts them.

    fake_server.py launch_pd ...     sglang_hma.launch_pd with fake servers and a fake router
    fake_server.py real-router ...   the same with the real router
    fake_server.py server|router     what these start

A fake server takes SGLang's flags and some of its own, given through
--prefill-args or --decode-args.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve())


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model-path")
    parser.add_argument("--served-model-name")
    parser.add_argument("--api-key")
    parser.add_argument("--fake-start-s", type=float, default=0.0)
    parser.add_argument("--fake-say", help="a file to print at the start")
    parser.add_argument("--fake-die", action="store_true", help="exit with code 7 at the start")
    parser.add_argument("--fake-never-healthy", action="store_true")
    parser.add_argument(
        "--fake-orphans", action="store_true", help="leave processes of own session"
    )
    parser.add_argument("--fake-deaf", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--fake-polite", action="store_true", help="SIGTERM: exit with code 0")
    parser.add_argument("--fake-hold", help="a file: a POST is answered once it is not there")
    parser.add_argument("--fake-busy", help="a file: /health is answered once it is not there")
    parser.add_argument("--fake-flood", action="store_true", help="print without end")
    parser.add_argument("--fake-semaphore", action="store_true", help="leave one in /dev/shm")
    parser.add_argument("--fake-no-chat", action="store_true", help="refuse chat: no template")
    parser.add_argument("--fake-no-tokenizer", action="store_true", help="refuse text")
    return parser.parse_known_args(argv)[0]


def leave_orphans() -> None:
    """A titled process of its own session, and one whose parent is gone at once."""
    for kind in ("sleeper", "forker"):
        subprocess.Popen([sys.executable, HERE, kind], start_new_session=True)


def sleeper() -> None:
    import setproctitle

    # SGLang renames its processes, which overwrites their environment in memory.
    setproctitle.setproctitle("fake::scheduler" + "x" * 200)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def flood() -> None:
    """As fast as they are read: a server whose output nobody took would hang in it."""
    for i in itertools.count():
        print(f"flood {i} {'x' * 1000}", flush=True)
        time.sleep(0.001)


def serve(argv: list[str], role: str) -> None:
    args = parse(argv)
    name = args.served_model_name or args.model_path or "the-model"
    print(f"{role} arguments: {json.dumps(argv)}", flush=True)
    print(f"share {os.environ.get('SGLANG_HMA_SHARE')}", file=sys.stderr, flush=True)
    if args.fake_orphans:
        leave_orphans()
    if args.fake_say:
        print(Path(args.fake_say).read_text(), flush=True)
    if args.fake_die:
        os._exit(7)
    if args.fake_flood:
        threading.Thread(target=flood, daemon=True).start()
    if args.fake_semaphore:
        held = multiprocessing.get_context("spawn").Semaphore()
        print(f"semaphore {held._semlock.name}", flush=True)
    born = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def refused(self) -> bool:
            wanted = f"Bearer {args.api_key}"
            return bool(args.api_key) and self.headers.get("Authorization") != wanted

        def do_GET(self) -> None:
            if self.path == "/health" and args.fake_busy and Path(args.fake_busy).exists():
                print("busy", flush=True)
                while Path(args.fake_busy).exists():
                    time.sleep(0.1)
            starting = args.fake_never_healthy or time.monotonic() < born + args.fake_start_s
            if self.path in ("/health", "/health/live", "/readiness", "/liveness"):
                self.reply(503 if starting else 200, {})
            elif self.refused():
                self.reply(401, {"error": "no key"})
            elif self.path == "/v1/models":
                self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"}]})
            else:
                self.reply(200, {"model_path": args.model_path, "served_model_name": name})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.refused():
                self.reply(401, {"error": "no key"})
                return
            while args.fake_hold and Path(args.fake_hold).exists():
                print("held", flush=True)
                time.sleep(0.1)
            if args.fake_no_chat and "messages" in body:
                self.reply(400, {"error": {"message": "no chat template"}})
            elif args.fake_no_tokenizer and "input_ids" not in body:
                self.reply(400, {"error": {"message": "no tokenizer"}})
            else:
                self.reply(200, {"model": body.get("model"), "choices": [{"text": "hi"}]})

        def log_message(self, format: str, *values: Any) -> None:
            print(format % values, flush=True)

    if args.fake_deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.fake_polite:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()


def launch(argv: list[str], *, real_router: bool) -> int:
    from sglang_hma.launch_pd import Commands, main

    server, router = (sys.executable, HERE, "server"), (sys.executable, HERE, "router")
    return main(argv, Commands(server) if real_router else Commands(server, router))


if __name__ == "__main__":
    what, rest = sys.argv[1], sys.argv[2:]
    if what in ("server", "router"):
        serve(rest, what)
    elif what == "sleeper":
        sleeper()
    elif what == "forker":
        if os.fork() == 0:
            os.setsid()
            sleeper()
    else:
        raise SystemExit(launch(rest, real_router=what == "real-router"))
