"""Control messages on their way to peers: sending never waits.

SGLang sends from whatever thread has something to say, on sockets that block for up to 30 s when a
peer takes nothing any more; a thread that serves all peers would wait for one. Here messages are
put into the peer's own queue, which one thread empties.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import zmq

from sglang_hma.transfer.limited_log import LimitedLog

logger = logging.getLogger(__name__)

# Bounds of one peer's queue, and of how many peers have one.
MAX_MESSAGES = 8192
MAX_BYTES = 8 << 20
MAX_PEERS = 512
MESSAGE_BYTES = 256  # what a message takes beside its frames

SOCKET_MESSAGES = 256  # in ZeroMQ's own queue
BURST = 64  # messages to one peer before it is another's turn
# A peer that takes nothing for so long has ended, or will have forgotten its requests.
GIVE_UP_S = 180.0
IDLE_S = 120.0  # then the connection is closed; the next message makes a new one
TICK_MS = 1000
RECONNECT_MS, MAX_RECONNECT_MS = 100, 2000


@dataclass(eq=False)
class Peer:
    """`took_s` is when it last took a message, or when the first that waits was put."""

    endpoint: str
    queue: deque[tuple[list[bytes], bool]] = field(default_factory=deque)
    size: int = 0  # bytes
    lost: int = 0  # since it last took all that waited
    took_s: float = field(default_factory=time.monotonic)
    socket: zmq.Socket[bytes] | None = None


class Outbox:
    """Messages to one peer arrive in the order in which they were put. A queue that is full loses
    its oldest message: what is told about one request means nothing to the others, and lists of
    claims repair what is lost. Messages that others build on are `kept` instead, and whoever puts
    them learns that there was no room.

    A peer's socket is used under the lock. Only the thread waits for it, outside the lock, and only
    while the peer's queue is not empty; `put` leaves the socket alone then.

    `options` are ZeroMQ's, for every socket.
    """

    def __init__(self, options: Mapping[int, int | bytes] | None = None) -> None:
        self._options = options or {}
        self._peers: dict[str, Peer] = {}
        self._evicted: list[Peer] = []
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._log = LimitedLog(logger)
        self._closed = False
        self._lost = 0
        self.thread = threading.Thread(target=self._run, name="hma-outbox", daemon=True)
        self.thread.start()

    # -- any thread --

    def put(self, endpoint: str, frames: Sequence[bytes], *, kept: bool = False) -> bool:
        """Send a message to `tcp://host:port`, or queue it. Never blocks. False if there is no room
        for it."""
        message = list(frames)
        with self._lock:
            if self._closed:
                return False
            peer = self._peers.get(endpoint) or self._new_peer(endpoint)
            if not peer.queue:
                peer.took_s = time.monotonic()
                if self._sends(peer, message):
                    return True
            losing = peer.lost > 0
            taken = self._append(peer, message, kept)
            begins_to_lose = peer.lost > 0 and not losing
        if begins_to_lose:
            self._log.warning("%s takes no messages, and its queue is full", endpoint)
        self._wake()
        return taken

    def waiting(self, endpoint: str) -> int:
        """How many messages a peer has not taken yet."""
        with self._lock:
            peer = self._peers.get(endpoint)
            return len(peer.queue) if peer is not None else 0

    def count_waiting(self) -> int:
        """Messages that no peer has taken yet."""
        with self._lock:
            return sum(len(peer.queue) for peer in self._peers.values())

    def count_lost(self) -> int:
        """Messages that nobody will take, since the beginning."""
        return self._lost

    def close(self) -> None:
        """Ends the thread; what has not been taken is lost."""
        with self._lock:
            self._closed = True
        self._wake()
        self.thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it will wake anyway
            os.eventfd_write(self._event, 1)

    # -- under the lock --

    def _new_peer(self, endpoint: str) -> Peer:
        if len(self._peers) >= MAX_PEERS:
            silent = min(self._peers.values(), key=lambda peer: peer.took_s)
            self._evicted.append(self._peers.pop(silent.endpoint))
        peer = self._peers[endpoint] = Peer(endpoint)
        return peer

    def _append(self, peer: Peer, message: list[bytes], kept: bool) -> bool:
        size = _size(message)
        while peer.queue and (len(peer.queue) >= MAX_MESSAGES or peer.size + size > MAX_BYTES):
            oldest, stays = peer.queue[0]
            peer.lost += 1
            self._lost += 1
            if kept or stays:
                return False
            peer.queue.popleft()
            peer.size -= _size(oldest)
        peer.queue.append((message, kept))
        peer.size += size
        return True

    def _sends(self, peer: Peer, message: list[bytes]) -> bool:
        """Whether the peer takes a message now."""
        try:
            if peer.socket is None:
                peer.socket = self._connect(peer.endpoint)
            peer.socket.send_multipart(message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            self._log.warning("A message to %s is lost: %s", peer.endpoint, error)
            self._lost += 1
        peer.took_s = time.monotonic()
        return True

    def _connect(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        for option, value in (
            (zmq.IPV6, endpoint.startswith("tcp://[")),
            # Messages stay here until there is a connection.
            (zmq.IMMEDIATE, 1),
            (zmq.SNDHWM, SOCKET_MESSAGES),
            (zmq.LINGER, 0),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.TCP_KEEPALIVE_IDLE, 30),
            (zmq.TCP_KEEPALIVE_INTVL, 5),
            (zmq.TCP_KEEPALIVE_CNT, 3),
        ):
            socket.setsockopt(option, int(value))
        for name, given in self._options.items():
            socket.setsockopt(name, given)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError:
            socket.close()
            raise
        return socket

    # -- the thread --

    def _run(self) -> None:
        try:
            while not self._closed:
                self._wait(self._send_what_waits())
                self._forget_silent()
        finally:
            self._context.destroy(linger=0)

    def _send_what_waits(self) -> list[zmq.Socket[bytes]]:
        """The sockets of peers that take nothing at the moment. BURST messages to one peer, then it
        is another's turn."""
        blocked = []
        with self._lock:
            peers = [peer for peer in self._peers.values() if peer.queue]
        for peer in peers:
            with self._lock:
                for _ in range(BURST):
                    if not peer.queue:
                        break
                    if not self._sends(peer, peer.queue[0][0]):
                        blocked.append(peer.socket)
                        break
                    message, _ = peer.queue.popleft()
                    peer.size -= _size(message)
                else:
                    self._wake()
                lost = peer.lost
                if not peer.queue:
                    peer.lost = 0
            if lost and not peer.queue:
                self._log.warning("%s takes messages again; %d were lost", peer.endpoint, lost)
        return [socket for socket in blocked if socket is not None]

    def _wait(self, blocked: Sequence[zmq.Socket[bytes]]) -> None:
        """Until there is a new message, or a peer takes one again."""
        poller = zmq.Poller()
        poller.register(self._event, zmq.POLLIN)
        for socket in blocked:
            poller.register(socket, zmq.POLLOUT)
        poller.poll(TICK_MS)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def _forget_silent(self) -> None:
        now = time.monotonic()
        with self._lock:
            silent, self._evicted = self._evicted, []
            for peer in list(self._peers.values()):
                if now - peer.took_s > (GIVE_UP_S if peer.queue else IDLE_S):
                    silent.append(self._peers.pop(peer.endpoint))
        for peer in silent:
            if peer.socket is not None:
                peer.socket.close()
            with self._lock:
                self._lost += len(peer.queue)
            if lost := len(peer.queue) + peer.lost:
                silent_s = now - peer.took_s
                self._log.warning(
                    "%s has taken no message for %.0f s: %d are lost", peer.endpoint, silent_s, lost
                )


class Socket:
    """What SGLang's receivers send on, in place of a ZeroMQ socket of their own."""

    def __init__(self, outbox: Outbox, endpoint: str) -> None:
        self._outbox = outbox
        self._endpoint = endpoint

    def send_multipart(self, frames: Sequence[bytes]) -> None:
        """Raises zmq.Again if there is no room: SGLang then fails the request."""
        if not self._outbox.put(self._endpoint, frames, kept=True):
            raise zmq.Again()


def _size(message: Sequence[bytes]) -> int:
    return MESSAGE_BYTES + sum(map(len, message))
