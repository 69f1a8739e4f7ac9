"""What a server's HTTP process says and does beyond SGLang's, as ASGI middleware."""

import asyncio
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from sglang_hma.launch.defaults import LIVE_PATH
from sglang_hma.launch.members import Members

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
ASK_AFTER_S = 5.0  # without a word of a scheduler's own
# Three checks of a router that asks every 3 seconds. A request that one half of a pair refuses is
# one that the other half waits for: SGLang's router waits for both before it tries again.
ANNOUNCE_S = 10.0
STILL_TAKEN = ("/abort_request",)  # while a server ends
# SGLang looks for it every few seconds while it waits for requests to end.
FORCE_SHUTDOWN = "SGL_FORCE_SHUTDOWN"


class Engine(Protocol):
    """What is asked of SGLang's tokenizer manager."""

    gracefully_exit: bool  # from SIGTERM on
    last_receive_tstamp: float  # of anything from a scheduler or detokenizer

    async def get_internal_state(self) -> Any:
        """A scheduler answers between two passes."""


class Guarded:
    """Around SGLang's whole application.

    - `LIVE_PATH` answers at once: 200 as long as the server's processes live, busy or not, and 503
      with the reason while it starts, ends, or one of them is stopped or gone. SGLang's /health
      waits for a token of the model's, so for whatever pass is running.
    - A server whose process is gone, stopped for long, or neither answers nor computes, ends with
      that reason in its log, after `hang_timeout` seconds.
    - From SIGTERM on `LIVE_PATH` says that the server is ending. It still takes requests for
      ANNOUNCE_S seconds, so that a router that asks is told before it is refused; a second SIGTERM
      ends that. Then new requests get 503 with Retry-After, and those that run may finish for
      `drain_timeout` seconds.

    `started` gives the engine once it serves; `root` is the server's main process, and `end` ends
    all of it.
    """

    def __init__(
        self,
        application: Any,
        *,
        started: Callable[[], Engine | None],
        root: int,
        end: Callable[[], None],
        drain_timeout: float,
        hang_timeout: float,
    ) -> None:
        self._application, self._started, self._root = application, started, root
        self._end = end
        self._drain_timeout, self._hang_timeout = drain_timeout, hang_timeout
        self._members: Members | None = None
        self._takes_sigterm = root == os.getpid()
        self._leaves_at: float | None = None  # from SIGTERM on: when new requests are refused
        self._ends_at: float | None = None
        self._heard = 0.0
        self._running: set[asyncio.Task[Any]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[Any] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        elif scope["type"] == "http":
            path, engine = scope["path"], self._started()
            if path == LIVE_PATH:
                await self._tell(send, self._trouble(engine))
                return
            if self._is_ending(engine) and scope["method"] == "POST" and path not in STILL_TAKEN:
                await self._tell(send, "the server is ending: it takes no new requests")
                return
            await self._run(self._application(scope, receive, send))
            return
        await self._application(scope, receive, send)

    async def _run(self, request: Coroutine[Any, Any, None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            await request
        finally:
            self._running.discard(task)

    async def _tell(self, send: Any, trouble: str | None) -> None:
        words = {"status": "alive"} if trouble is None else {"error": {"message": trouble}}
        body = json.dumps(words).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if self._ends_at is not None:
            left = max(1, math.ceil(self._ends_at - time.monotonic()))
            headers.append((b"retry-after", b"%d" % left))
        start = {"type": "http.response.start", "status": 200 if trouble is None else 503}
        await send(start | {"headers": headers})
        await send({"type": "http.response.body", "body": body})

    def asked_to_end(self) -> None:
        """SIGTERM, in place of SGLang's own handler, from which on requests are refused."""
        if self._leaves_at is None:
            self._leaves_at = time.monotonic() + ANNOUNCE_S
            logger.warning("SIGTERM: this server takes requests for %g s more", ANNOUNCE_S)
        else:
            self._leaves_at = 0.0
            self._leave(self._started())

    def _leave(self, engine: Engine | None) -> None:
        """Have SGLang end, once the time is up."""
        announced = self._leaves_at is not None and time.monotonic() >= self._leaves_at
        if announced and engine is not None:
            engine.gracefully_exit = True

    def _is_ending(self, engine: Engine | None) -> bool:
        if engine is None or not engine.gracefully_exit:
            return False
        if self._ends_at is None:
            self._ends_at = time.monotonic() + self._drain_timeout
        return True

    def _trouble(self, engine: Engine | None) -> str | None:
        if self._leaves_at is not None or self._is_ending(engine):
            return "the server is ending"
        if self._members is None:
            return "the server is starting"
        return self._members.trouble()

    async def _watch(self) -> None:
        while True:
            try:
                self._look(self._started())
            except Exception:
                logger.exception("sglang-hma cannot tell whether this server lives")
            await asyncio.sleep(LOOK_EVERY_S)

    def _look(self, engine: Engine | None) -> None:
        if engine is None:
            return
        if self._takes_sigterm:
            self._takes_sigterm = False
            # SGLang sets its own handler with its first request, so before it has started.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.asked_to_end)
        self._leave(engine)
        if self._is_ending(engine):
            if self._ends_at is not None and time.monotonic() > self._ends_at:
                self._cut()
            return
        if self._members is None:
            self._members = Members(self._root, LOOK_EVERY_S)
        self._ask(engine)
        self._members.look(answered=engine.last_receive_tstamp > self._heard)
        self._heard = engine.last_receive_tstamp
        reason = self._members.fatal(self._hang_timeout)
        if reason is not None:
            logger.error("sglang_hma.launch_server: error: %s, so this server ends", reason)
            self._end()

    def _cut(self) -> None:
        """End the requests that still run: uvicorn would wait for them for ever."""
        if self._running:
            logger.error("%d requests still run and are cut", len(self._running))
        os.environ[FORCE_SHUTDOWN] = "1"
        for task in self._running:
            task.cancel()

    def _ask(self, engine: Engine) -> None:
        """Have a scheduler say something, if all have been silent for a while."""
        silent = time.time() - engine.last_receive_tstamp > ASK_AFTER_S
        if silent and (self._asking is None or self._asking.done()):
            self._asking = asyncio.get_running_loop().create_task(engine.get_internal_state())
