"""When a thread of the transfer ends, the server does, in words."""

import subprocess
import sys
import threading

import pytest

from sglang_hma.transfer import thread_watch
from sglang_hma.transfer.thread_watch import ThreadWatch

from .real_managers import Pair

SCRIPT = """
import logging, os, signal, threading, time
from sglang_hma.transfer.thread_watch import ThreadWatch

def fails():
    raise RuntimeError("a bug of this thread")

signal.signal(signal.SIGQUIT, lambda *_: os._exit(7))  # what SGLang's server does there
if os.fork() == 0:  # the scheduler
    logging.basicConfig()
    thread = threading.Thread(target=fails, name="bootstrap_thread")
    thread.start()
    ThreadWatch(lambda: [thread], lambda: False).run()
    os._exit(0)
while True:
    time.sleep(1000)
"""


def test_the_server_ends_in_words() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 7
    assert "a bug of this thread" in done.stderr
    assert "This server ends: the thread bootstrap_thread of the KV transfer" in done.stderr


def test_threads_that_have_not_begun_or_are_meant_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_watch, "LOOK_EVERY_S", 0.001)
    ended: list[str] = []
    stopping, going = threading.Event(), threading.Event()
    threads = [threading.Thread(target=going.wait, name="late"), threading.current_thread()]
    watch = ThreadWatch(lambda: threads, stopping.is_set, ended.append)
    watch.start()
    threads[0].start()
    assert watch.is_alive() and not ended
    stopping.set()
    going.set()
    watch.join()
    assert not ended


def test_every_thread_of_both_roles_is_watched(managers: Pair) -> None:
    """SGLang's own and ours. Those of SGLang's that end at once with plain pages would end it."""
    names = {
        role: {thread.name.partition(" (")[2].rstrip(")") or thread.name for thread in threads}
        for role, threads in (
            ("prefill", managers.prefill.watched_threads()),
            ("decode", managers.decode.watched_threads()),
        )
    }
    assert {"bootstrap_thread", "hma-send", "hma-outbox"} <= names["prefill"]
    assert {"decode_thread", "HeartbeatChecker", "hma-outbox"} <= names["decode"]
    managers.check()
