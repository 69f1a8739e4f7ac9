"""What ends the scheduler's wait: real sockets and threads."""

import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from sglang_hma.transfer.decode.news import News

LONG_S = 600.0  # pytest's timeout ends a hang


@pytest.fixture
def sockets() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.bind("inproc://requests")
        with context.socket(zmq.PUSH) as push:
            push.connect("inproc://requests")
            yield pull, push


def test_news_of_before_counts_once(sockets: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    news, (pull, _) = News(), sockets
    for _ in range(1000):
        news.note()
    assert news.wait(pull, LONG_S)
    assert not news.wait(pull, 0.005)


def test_another_thread_ends_the_wait(
    sockets: tuple[zmq.Socket[bytes], zmq.Socket[bytes]],
) -> None:
    news, (pull, _) = News(), sockets
    for _ in range(50):
        thread = threading.Thread(target=news.note)
        thread.start()
        assert news.wait(pull, LONG_S)
        thread.join()


def test_a_request_ends_the_wait_until_it_is_taken(
    sockets: tuple[zmq.Socket[bytes], zmq.Socket[bytes]],
) -> None:
    news, (pull, push) = News(), sockets
    push.send(b"a request")
    assert news.wait(pull, LONG_S) and news.wait(pull, LONG_S)
    assert pull.recv() == b"a request"
    began = time.thread_time()
    assert not news.wait(pull, 0.2)
    assert time.thread_time() - began < 0.1, "it waits without computing"
