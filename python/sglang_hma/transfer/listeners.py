"""Listening sockets of Mooncake and of torch's TCPStore, which know no address to bind to and let
everybody in.

They listen on every interface. A socket filter drops what does not come to the address that they
should have been bound to, or to loopback; a connection to another address of the host finds nobody.
What only the ranks of one host use drops all that does not come from there. With a cluster secret
Mooncake's ports drop all but what comes from hosts that have proved that they know it.
"""

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from sglang_hma.config import HmaConfig
from sglang_hma.packet_filter import FROM, TO, Only, attach
from sglang_hma.transfer.tcp_table import listening, plain

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1")
# Of hosts at a time; one that was heard of less lately than so many others is heard of again before
# it connects again.
MAX_ADMITTED = 256


def open_to_all() -> Iterator[socket.socket]:
    """This process's TCP sockets that listen on every interface; as `listening` yields them."""
    for sock in listening():
        if ipaddress.ip_address(sock.getsockname()[0]).is_unspecified:
            yield sock


def _inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


# Of this process, by inode.
_restricted: set[int] = set()


def bind(address: str, end: tuple[int, int] = TO) -> None:
    """Let only what goes TO `address` or loopback, or comes FROM there, reach what is new of
    `open_to_all`. A kernel that cannot do it is said in the log."""
    for sock in open_to_all():
        if _inode(sock) not in _restricted:
            _restricted.add(_inode(sock))
            _attach(sock, f"not on {address} alone", Only((address, *LOOPBACK), end))


def _attach(sock: socket.socket, instead: str, *conditions: Only) -> None:
    try:
        attach(sock, *conditions)
    except OSError as error:
        logger.warning(
            "port %d stays open on every interface, %s (%s): see docs/security.md",
            sock.getsockname()[1],
            instead,
            error.strerror,
        )


class Gate:
    """Listening sockets that only hosts reach which have proved to be of the cluster, and nobody
    before the first has."""

    def __init__(self, inodes: set[int], address: str | None) -> None:
        self._inodes = inodes
        self._bound = [Only((address, *LOOPBACK), TO)] if address is not None else []
        self._admitted: dict[str, None] = {}  # the one that was heard of last is last
        self._lock = threading.Lock()
        self._apply()

    def admit(self, address: str) -> None:
        """A host has proved it. Costs little where it is known."""
        with self._lock:
            known = address in self._admitted
            self._admitted.pop(address, None)
            self._admitted[address] = None
            if known:
                return
            if len(self._admitted) > MAX_ADMITTED:
                del self._admitted[next(iter(self._admitted))]
            self._apply()
        logger.info("%s knows the cluster secret: it may write KV pages here", address)

    def _apply(self) -> None:
        only = Only(tuple(self._admitted), FROM)
        for sock in listening():
            if _inode(sock) in self._inodes:
                _attach(sock, "not only for servers with the cluster secret", *self._bound, only)


# By Mooncake's engine.
_gates: WeakKeyDictionary[Any, Gate] = WeakKeyDictionary()


def admit(engine: Any, address: str) -> None:
    """Let a host reach the ports of a Mooncake engine. `address` is where a message that proves
    it came from."""
    gate = _gates.get(engine)
    if gate is not None:
        gate.admit(plain(ipaddress.ip_address(address.partition("%")[0])))


def init_distributed_environment(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """SGLang's own, whose TCPStore listens from here on."""
    from sglang.srt.runtime_context import get_parallel

    made = original(*args, **options)
    address = HmaConfig.require().bind
    if address is not None:
        bind(address, FROM if get_parallel().nnodes == 1 else TO)
    return made


def initialize(original: Callable[..., Any], engine: Any, *args: Any, **options: Any) -> Any:
    """Of Mooncake, which listens from here on; no memory is registered yet."""
    before = {_inode(sock) for sock in open_to_all()}
    made = original(engine, *args, **options)
    config = HmaConfig.require()
    if config.cluster_secret_file is not None:
        new = {_inode(sock) for sock in open_to_all()} - before
        _restricted.update(new)
        _gates[engine] = Gate(new, config.bind)
    elif config.bind is not None:
        bind(config.bind)
    return made
