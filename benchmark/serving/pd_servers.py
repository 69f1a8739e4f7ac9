"""A prefill server and decode servers: a router brings each request to both, or the client."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import aiohttp

PORTS = range(10100, 14900)  # none that the kernel, Mooncake or SGLang picks by itself
HOST = "127.0.0.1"
MARGINS = {"return_logprob": True, "top_logprobs_num": 2}


def free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((HOST, port))
            return port


@dataclass
class Program:
    """python -m `module` in a session of its own, its output in a file, with a port."""

    name: str
    log: Path
    flags: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    ready_s: float | None = None
    module: ClassVar[str]
    health: ClassVar[str]

    def run(self, *arguments: str) -> None:
        self.port, self.began = free_port(), time.monotonic()
        command = [sys.executable, "-m", self.module, "--host", HOST, "--port", str(self.port)]
        with self.log.open("w") as out:
            self.popen = subprocess.Popen(
                [*command, *arguments, *self.flags],
                env=os.environ | self.env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def alive(self) -> bool:
        return self.popen.poll() is None

    def wait_ready(self, deadline: float) -> bool:
        """Whether it serves before `deadline`, of time.monotonic()."""
        while self.alive() and time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(self.url + self.health, None, 5),
            ):
                self.ready_s = time.monotonic() - self.began
                return True
            time.sleep(0.2)
        return False

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


class Server(Program):
    module, health = "sglang_hma.launch_server", "/health"

    def start(self, model: Path, mode: str) -> "Server":
        self.bootstrap = free_port()
        arguments = ["--model-path", str(model), "--disaggregation-mode", mode]
        if mode == "prefill":
            arguments += ["--disaggregation-bootstrap-port", str(self.bootstrap)]
        self.run(*arguments)
        return self

    def info(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + "/get_server_info", None, 10) as reply:
            states: list[dict[str, Any]] = json.load(reply)["internal_states"]
        return dict(states[0]["hma"])


class Router(Program):
    """sglang_router before one pair; ready when it knows both."""

    module, health = "sglang_hma.launch.router", "/readiness"

    def start(self, prefill: Server, decode: Server) -> "Router":
        routes = ["--prefill", prefill.url, str(prefill.bootstrap), "--decode", decode.url]
        metrics = ["--prometheus-host", HOST, "--prometheus-port", str(free_port())]
        self.run("--pd-disaggregation", "--policy", "random", *routes, *metrics)
        return self


@dataclass
class Stream:
    """When the tokens of one request came, in seconds since it was sent."""

    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.seconds[0]

    @property
    def tpot(self) -> float:
        return (self.seconds[-1] - self.seconds[0]) / (self.counts[-1] - self.counts[0])


async def read_stream(reply: aiohttp.ClientResponse, began: float) -> Stream:
    """Of a request that was sent at `began`, of time.perf_counter()."""
    stream = Stream()
    async for line in reply.content:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "meta_info" not in event:
                raise RuntimeError(f"a stream says {event}")
            stream.seconds.append(time.perf_counter() - began)
            stream.counts.append(event["meta_info"]["completion_tokens"])
    return stream


class PdClient:
    """Sends each request to the router of a pair, else to both servers as SGLang's router does."""

    def __init__(self, prefill: Server, decode: Server, router: Router | None = None) -> None:
        self.prefill, self.decode, self.router = prefill, decode, router

    async def answer(self, ids: list[int], tokens: int, timeout: float) -> dict[str, Any]:
        """The whole answer, with the two best logprobs of each token."""
        async with self._session(timeout) as session:
            return await self._both(session, self._body(ids, tokens, **MARGINS), self._json)

    async def streams(self, prompts: list[list[int]], tokens: int, timeout: float) -> list[Stream]:
        """All prompts at once."""
        async with self._session(timeout) as session:
            bodies = [self._body(ids, tokens, stream=True) for ids in prompts]
            return await asyncio.gather(*(self._both(session, b, read_stream) for b in bodies))

    @staticmethod
    def _session(timeout: float) -> aiohttp.ClientSession:
        limit = aiohttp.ClientTimeout(total=timeout)
        return aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0))

    def _body(self, ids: list[int], tokens: int, **extra: Any) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        return {"input_ids": ids, "sampling_params": sampling, **extra}

    async def _both(self, session: aiohttp.ClientSession, body: dict[str, Any], read: Any) -> Any:
        if self.router is not None:
            return await self._post(session, self.router, body, read)
        body |= {
            "bootstrap_host": HOST,
            "bootstrap_port": self.prefill.bootstrap,
            "bootstrap_room": random.randrange(2**63),
        }
        async with asyncio.TaskGroup() as group:
            group.create_task(self._drain(session, body))
            wanted = group.create_task(self._post(session, self.decode, body, read))
        return wanted.result()

    async def _drain(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        await self._post(session, self.prefill, body, lambda reply, _: reply.read())

    @staticmethod
    async def _post(
        session: aiohttp.ClientSession, server: Program, body: dict[str, Any], read: Any
    ) -> Any:
        began = time.perf_counter()
        async with session.post(f"{server.url}/generate", json=body) as reply:
            if reply.status != 200:
                text = (await reply.text())[:500]
                raise RuntimeError(f"{server.name} answers {reply.status}: {text}")
            return await read(reply, began)

    @staticmethod
    async def _json(reply: aiohttp.ClientResponse, _: float) -> dict[str, Any]:
        return dict(await reply.json(content_type=None))
