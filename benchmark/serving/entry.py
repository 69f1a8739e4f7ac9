"""What the entry costs: streams through it beside streams through SGLang's router alone.

python -m benchmark.serving.entry [--requests 640] [--json FILE]

Two stand-in servers answer at once with a stream of 32 events, so all that is measured is the
way there and back, on one machine.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import aiohttp

from sglang_hma.launch.defaults import ROUTER_DEFAULTS
from test.e2e.harness import Server, free_port, running

EVENTS, AT_ONCE = 32, 32
BODY = {"text": "a" * 2000, "stream": True, "sampling_params": {"max_new_tokens": EVENTS}}


def stand_in(port: int) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    from sglang_hma.launch.unpacking import Unpacking

    async def events() -> AsyncIterator[str]:
        for index in range(EVENTS):
            yield f"data: {json.dumps({'text': 'a' * index})}\n\n"
            await asyncio.sleep(0)
        yield "data: [DONE]\n\n"

    async def answer(request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"model_path": "m", "data": [{"id": "m"}]})
        await request.body()
        return StreamingResponse(events(), media_type="text/event-stream")

    app: Any = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    uvicorn.run(Unpacking(app), port=port, log_level="warning")


async def ask(url: str, count: int) -> dict[str, float]:
    first, gate = [], asyncio.Semaphore(AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one() -> None:
            async with gate:
                start = time.perf_counter()
                async with session.post(f"{url}/generate", json=BODY) as reply:
                    assert reply.status == 200, await reply.text()
                    await reply.content.readany()
                    first.append(time.perf_counter() - start)
                    await reply.read()

        start = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(count)))
        took = time.perf_counter() - start
    return {"requests_per_second": count / took, "first_event_ms": 1e3 * statistics.median(first)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    ports = [free_port(), free_port()]
    servers = [get_context("spawn").Process(target=stand_in, args=(port,)) for port in ports]
    for server in servers:
        server.start()
    prefill, decode = (f"http://127.0.0.1:{port}" for port in ports)
    flags = ["--pd-disaggregation", "--policy", "random", *ROUTER_DEFAULTS]
    flags += ["--prefill", prefill, "8998", "--decode", decode]
    modules = {"router": "sglang_hma.entry.router_process", "entry": "sglang_hma.launch.router"}
    routers, found = {}, {}
    logs = Path(tempfile.mkdtemp())
    for name, module in modules.items():
        port = free_port()
        command = [sys.executable, "-m", module, *flags, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-port", str(free_port())]
        url = f"http://127.0.0.1:{port}"
        routers[name] = Server(name, command, logs / name, url=url, ready_path="/readiness").start()
    try:
        with running(*routers.values()):
            for turn in range(3):
                for name, router in routers.items():
                    figures = asyncio.run(ask(router.url, given.requests))
                    if turn:  # the first warms up
                        found.setdefault(name, []).append(figures)
                        print(name, figures, flush=True)
    finally:
        for server in servers:
            server.terminate()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
