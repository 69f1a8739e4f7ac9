"""A server's HTTP process around real processes that have SGLang's names."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sglang_hma.launch import guarded
from sglang_hma.launch.defaults import LIVE_PATH
from sglang_hma.launch.guarded import Guarded

from .fleet import STUCK_S

SERVER = """
import signal, subprocess, sys
signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell's background job ignores it
child = "import setproctitle, time; setproctitle.setproctitle('sglang::%s'); print(flush=True); "
names = ("scheduler_TP0", "detokenizer")
procs = [
    subprocess.Popen([sys.executable, "-c", child % name + "time.sleep(3600)"], stdout=-1)
    for name in names
]
[proc.stdout.readline() for proc in procs]
print(*[proc.pid for proc in procs], flush=True)
sys.stdin.read()
"""


class Server:
    """Its main process ends on SIGQUIT, as SGLang's."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SERVER]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.popen.stdout is not None
        self.scheduler, self.detokenizer = map(int, self.popen.stdout.readline().split())

    def stop(self) -> None:
        self.popen.kill()
        for pid in (self.scheduler, self.detokenizer):
            subprocess.run(["kill", "-9", str(pid)], stderr=subprocess.DEVNULL, check=False)
        self.popen.communicate()


class Engine:
    """Whether its schedulers answer is the test's to say."""

    gracefully_exit = False
    last_receive_tstamp = 0.0
    answers = True
    asked = 0

    async def get_internal_state(self) -> list[Any]:
        self.asked += 1
        while not self.answers:
            await asyncio.sleep(0.01)
        self.last_receive_tstamp = time.time()
        return []


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(guarded, "ASK_AFTER_S", 0.1)


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        while scope["path"] == "/never":
            await asyncio.sleep(3600)
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Client:
    def __init__(self, server: Server, engine: Engine, **timeouts: float) -> None:
        self.engine: Engine | None = engine
        limits = {"drain_timeout": 30.0, "hang_timeout": 3600.0} | timeouts
        self.app = Guarded(
            application,
            started=lambda: self.engine,
            root=server.popen.pid,
            end=lambda: server.popen.send_signal(signal.SIGQUIT),
            **limits,
        )

    async def begin(self) -> None:
        await self.app({"type": "lifespan"}, None, None)

    async def ask(
        self, path: str = LIVE_PATH, method: str = "GET"
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers, and the reason if there is one."""
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app({"type": "http", "path": path, "method": method}, None, send)
        start, body = sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        words = json.loads(body["body"] or "{}")
        return start["status"], headers, words.get("error", {}).get("message", "")

    async def until(self, what: Callable[[int, str], bool]) -> None:
        deadline = time.monotonic() + STUCK_S
        while True:
            status, _, reason = await self.ask()
            if what(status, reason):
                return
            assert time.monotonic() < deadline, reason
            await asyncio.sleep(0.02)


def test_alive_busy_stopped_and_alive_again(server: Server) -> None:
    async def main() -> None:
        engine = Engine()
        client = Client(server, engine)
        client.engine = None
        await client.begin()
        assert (await client.ask())[::2] == (503, "the server is starting")
        client.engine = engine
        await client.until(lambda status, _: status == 200)
        engine.answers = False  # in a long forward pass
        for _ in range(20):
            await asyncio.sleep(0.02)
            assert (await client.ask())[0] == 200
        assert engine.asked >= 1
        for pid, name in ((server.scheduler, "scheduler_TP0"), (server.detokenizer, "detokenizer")):
            os.kill(pid, signal.SIGSTOP)
            await client.until(lambda status, _: status == 503)
            assert (await client.ask())[2] == f"{name} (process {pid}) is stopped"
            os.kill(pid, signal.SIGCONT)
            await client.until(lambda status, _: status == 200)
        assert server.popen.poll() is None
        assert (await client.ask("/generate", "POST"))[0] == 299

    asyncio.run(main())


@pytest.mark.parametrize("victim", ["scheduler", "detokenizer"])
def test_ends_when_a_process_is_gone(
    server: Server, victim: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        client = Client(server, Engine())
        await client.begin()
        await client.until(lambda status, _: status == 200)
        os.kill(getattr(server, victim), signal.SIGKILL)
        await client.until(lambda *_: server.popen.poll() is not None)

    asyncio.run(main())
    assert server.popen.returncode == -signal.SIGQUIT
    assert f"error: {victim}" in caplog.text and "is gone, so this server ends" in caplog.text


@pytest.mark.parametrize("victim", ["scheduler", "detokenizer"])
def test_ends_when_a_process_is_stopped_for_long(
    server: Server, victim: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        client = Client(server, Engine(), hang_timeout=0.3)
        await client.begin()
        await client.until(lambda status, _: status == 200)
        os.kill(getattr(server, victim), signal.SIGSTOP)
        await client.until(lambda *_: server.popen.poll() is not None)

    asyncio.run(main())
    assert f"error: {victim}" in caplog.text and "is stopped since" in caplog.text


def test_ends_when_no_scheduler_answers_or_computes(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        engine = Engine()
        client = Client(server, engine, hang_timeout=0.5)
        await client.begin()
        await client.until(lambda status, _: status == 200)
        await client.until(lambda *_: engine.asked > 3)  # idle, and asked now and then
        assert server.popen.poll() is None
        engine.answers = False
        await client.until(lambda *_: server.popen.poll() is not None)

    asyncio.run(main())
    assert "no scheduler has answered or computed" in caplog.text


def test_an_ending_server_refuses_what_is_new(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        engine = Engine()
        client = Client(server, engine, drain_timeout=5.0)
        await client.begin()
        await client.until(lambda status, _: status == 200)
        engine.gracefully_exit = True
        status, headers, reason = await client.ask("/v1/completions", "POST")
        assert status == 503 and 1 <= int(headers["retry-after"]) <= 5 and "no new" in reason
        assert (await client.ask())[0] == 503
        assert (await client.ask("/abort_request", "POST"))[0] == 299
        assert (await client.ask("/metrics"))[0] == 299
        # Its processes end one by one, as they should.
        os.kill(server.detokenizer, signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert server.popen.poll() is None

    monkeypatch.delenv(guarded.FORCE_SHUTDOWN, raising=False)
    asyncio.run(main())


def test_a_server_says_that_it_ends_before_it_refuses(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that has not yet asked would send it requests, which the other half of the pair
    then waits for."""

    async def main() -> None:
        engine = Engine()
        client = Client(server, engine)
        client.app._takes_sigterm = True
        await client.begin()
        await client.until(lambda status, _: status == 200)
        os.kill(os.getpid(), signal.SIGTERM)
        await client.until(lambda *told: told == (503, "the server is ending"))
        assert (await client.ask("/generate", "POST"))[0] == 299
        assert not engine.gracefully_exit
        monkeypatch.setattr(guarded, "ANNOUNCE_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)  # there is nobody to tell
        await client.until(lambda *_: engine.gracefully_exit)
        assert (await client.ask("/generate", "POST"))[0] == 503
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)

    monkeypatch.setattr(guarded, "ANNOUNCE_S", 3600.0)
    asyncio.run(main())


def test_a_server_refuses_once_it_has_said_so_for_long_enough(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        engine = Engine()
        client = Client(server, engine)
        await client.begin()
        await client.until(lambda status, _: status == 200)
        client.app.asked_to_end()
        await client.until(lambda *_: engine.gracefully_exit)
        assert (await client.ask("/generate", "POST"))[0] == 503

    monkeypatch.setattr(guarded, "ANNOUNCE_S", 0.3)
    asyncio.run(main())


def test_an_ending_server_waits_so_long(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = Engine()
        engine.gracefully_exit = True
        client = Client(server, engine, drain_timeout=0.1)
        await client.begin()
        running = asyncio.create_task(client.ask("/never", "GET"))
        await client.until(lambda *_: guarded.FORCE_SHUTDOWN in os.environ)
        with pytest.raises(asyncio.CancelledError):
            await running

    monkeypatch.setenv(guarded.FORCE_SHUTDOWN, "")
    monkeypatch.delenv(guarded.FORCE_SHUTDOWN)
    asyncio.run(main())
