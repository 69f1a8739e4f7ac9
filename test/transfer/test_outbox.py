"""A peer that takes no messages costs nobody else a moment."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from sglang_hma.transfer import outbox
from sglang_hma.transfer.outbox import Outbox

from .real_managers import HOST, Pair, free_port, until


@pytest.fixture
def sender() -> Iterator[Outbox]:
    made = Outbox()
    yield made
    made.close()


@pytest.fixture
def receiver() -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.setsockopt(zmq.RCVHWM, 0)
        pull.bind(f"tcp://{HOST}:*")
        yield pull
        pull.close(linger=0)


def endpoint(pull: zmq.Socket[bytes]) -> str:
    return str(pull.get_string(zmq.LAST_ENDPOINT))


def refusing() -> str:
    return f"tcp://{HOST}:{free_port()}"


def test_nobody_waits_for_a_peer_that_refuses(sender: Outbox, receiver: zmq.Socket[bytes]) -> None:
    """SGLang's own sockets take 1,000 messages there, and then hold up each caller for 30 s."""
    dead, alive, count = refusing(), endpoint(receiver), 2000
    longest = 0.0
    for number in range(count):
        began = time.perf_counter()
        assert sender.put(dead, [b"77", b"0", b"0"])
        assert sender.put(alive, [b"%d" % number, b"x"])
        longest = max(longest, time.perf_counter() - began)
    assert [receiver.recv_multipart() for _ in range(count)] == [
        [b"%d" % number, b"x"] for number in range(count)
    ]
    assert sender.waiting(dead) == count and longest < 10


def test_messages_wait_for_a_server_that_is_late(sender: Outbox) -> None:
    port = free_port()
    for number in range(500):
        assert sender.put(f"tcp://{HOST}:{port}", [b"%d" % number])
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.bind(f"tcp://{HOST}:{port}")
        assert [pull.recv() for _ in range(500)] == [b"%d" % number for number in range(500)]
        until(lambda: sender.waiting(f"tcp://{HOST}:{port}") == 0)


def test_order_is_kept_while_many_threads_send(
    sender: Outbox, receiver: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through connections that take hold late and queues that fill and empty."""
    monkeypatch.setattr(outbox, "SOCKET_MESSAGES", 2)
    where, count = endpoint(receiver), 1500

    def send(name: int) -> None:
        for number in range(count):
            assert sender.put(where, [b"%d" % name, b"%d" % number])

    threads = [threading.Thread(target=send, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    heard: dict[bytes, list[int]] = {}
    for _ in range(4 * count):
        name, number = receiver.recv_multipart()
        heard.setdefault(name, []).append(int(number))
    assert all(numbers == list(range(count)) for numbers in heard.values()) and len(heard) == 4
    for thread in threads:
        thread.join()


def test_a_peer_that_does_not_read_keeps_what_fits(
    sender: Outbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stopped process: it is connected, its buffers are full. The oldest are lost, in one
    line; what others build on is refused instead."""
    monkeypatch.setattr(outbox, "MAX_BYTES", 1 << 20)
    with socket.create_server((HOST, 0), backlog=1) as silent:
        where = f"tcp://{HOST}:{silent.getsockname()[1]}"
        body = bytes(60_000)
        for number in range(2000):
            assert sender.put(where, [b"%d" % number, body])
        peer = sender._peers[where]
        assert peer.size <= 1 << 20 and peer.queue[-1][0][0] == b"1999"
        assert peer.lost >= 1900 and peer.lost + len(peer.queue) <= 2000
        assert not sender.put(where, [b"kept", body], kept=True)
        assert sender.count_lost() == peer.lost and sender.count_waiting() > 0
        assert caplog.text.count("its queue is full") == 1


def test_silent_peers_are_forgotten(sender: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_PEERS", 8)
    peers = [refusing() for _ in range(20)]
    for peer in peers:
        sender.put(peer, [b"x"])
    assert len(sender._peers) == 8 and sender.waiting(peers[-1]) == 1
    monkeypatch.setattr(outbox, "GIVE_UP_S", 0.0)
    until(lambda: not sender._peers)


@pytest.mark.parametrize("bad", ["", "tcp://", "tcp://host:99999999", "inproc://x", "tcp://[::1:5"])
def test_addresses_that_are_none(sender: Outbox, receiver: zmq.Socket[bytes], bad: str) -> None:
    assert sender.put(bad, [b"x"]) in (True, False)
    sender.put(endpoint(receiver), [b"y"])
    assert receiver.recv() == b"y" and sender.thread.is_alive()


def test_both_roles_go_on_beside_dead_peers(managers: Pair) -> None:
    """2,000 statuses, claims and aborts to a refused port from the threads that serve everybody."""
    dead, began = (HOST, free_port()), time.monotonic()
    room = next(managers.rooms)
    for _ in range(2000):
        managers.prefill.report_unopened(room, [dead], "it never came")
    info = {"rank_ip": dead[0], "rank_port": dead[1], "is_dummy": False}
    receiver = managers.receiver(next(managers.rooms))
    honest, receiver.bootstrap_infos = receiver.bootstrap_infos, [info]
    for _ in range(2000):
        receiver._send_abort_notification()
    receiver.bootstrap_infos = honest
    # SGLang's sockets would hold up 2,000 senders for 30 s, and the other 2,000 for 1 s each.
    assert time.monotonic() - began < 300
    receiver.abort()
    receiver.clear()
    managers.check()
