"""What ends the scheduler's wait for pages: a request that has changed its state, or a new one."""

import contextlib
import os
from typing import Any

import zmq


class News:
    """`note` may be called from any thread, `wait` from one."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def note(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the wait ends anyway
            os.eventfd_write(self._event, 1)

    def wait(self, requests: Any, at_most_s: float) -> bool:
        """Until there is news, or a message at the socket `requests`. False if there was none in
        `at_most_s`. News from before the call counts."""
        poller = zmq.Poller()
        poller.register(self._event, zmq.POLLIN)
        poller.register(requests, zmq.POLLIN)
        found = bool(poller.poll(round(at_most_s * 1000)))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        return found
