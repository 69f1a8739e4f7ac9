"""Asking a child over HTTP whether it is there."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from http.client import HTTPException
from typing import TypeVar

from sglang_hma.launch.program import Child
from sglang_hma.launch.pulse import Pulse

POLL_S = 0.25
WATCH_EVERY_S, ANSWER_WITHIN_S = 5.0, 10.0

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

T = TypeVar("T")


def background(call: Callable[[], T]) -> "Future[T]":
    """Run `call` on a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def answers(status: int) -> bool:
    return status > 0


def is_ready(status: int) -> bool:
    return status == 200


def poll(child: Child, test: Callable[[int], bool]) -> bool:
    """Return once the HTTP status of the child's `ready_url` passes `test`, or with False once the
    child has ended."""
    while child.alive():
        if test(_status(child.program.ready_url)):
            return True
        time.sleep(POLL_S)
    return False


def _status(url: str) -> int:
    """0 for no answer."""
    try:
        with direct.open(url, timeout=ANSWER_WITHIN_S) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, HTTPException):
        return 0


class Watch:
    """For how long a child has neither answered, whatever the answer, nor computed."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.silent_s = 0.0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        pulse = Pulse(self._child.popen.pid, WATCH_EVERY_S + ANSWER_WITHIN_S)
        while self._child.alive():
            self.silent_s = pulse.look(_status(self._child.program.alive_url) > 0)
            time.sleep(WATCH_EVERY_S)
