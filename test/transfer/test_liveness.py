"""A port that refuses is a dead process; one that is silent is not."""

import socket
import time

from sglang_hma.transfer.liveness import STRIKES, Obituaries, refuses


def wait_gone(watch: Obituaries, address: tuple[str, int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if watch.gone(address):
            return True
        time.sleep(0.05)
    return False


def test_refusing_ports_are_gone_and_listening_ones_are_not() -> None:
    watch = Obituaries()
    alive = socket.create_server(("127.0.0.1", 0))
    dead = socket.create_server(("127.0.0.1", 0))
    dead_address = dead.getsockname()[:2]
    dead.close()
    assert not watch.gone(dead_address), "one question is no proof"
    assert wait_gone(watch, dead_address, STRIKES + 5)
    assert not wait_gone(watch, alive.getsockname()[:2], STRIKES + 1)
    alive.close()


def test_silence_is_no_refusal() -> None:
    assert not refuses(("203.0.113.1", 9))  # a documentation address: nobody answers
