"""Listening sockets whose makers know no address to bind to: Mooncake's, and torch's TCPStore.

They listen on every interface. A socket filter (Linux, no privilege needed) drops what does not
come to the address that they should have been bound to, or to loopback; a connection to another
address of the host finds nobody. What only the ranks of one host use drops all that does not come
from there.
"""

import ctypes
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from sglang_hma.config import HmaConfig
from sglang_hma.transfer.tcp_table import listening

logger = logging.getLogger(__name__)

SO_ATTACH_FILTER = 26  # asm-generic/socket.h
LOOPBACK = ("127.0.0.1", "::1")
# Classic BPF (linux/filter.h): operations, and where the IP header begins.
LOAD_WORD, LOAD_BYTE, SHIFT_RIGHT, JUMP_EQUAL, RETURN = 0x20, 0x30, 0x74, 0x15, 0x06
IP_HEADER = 0xFFF00000
TO, FROM = (16, 24), (12, 8)  # where IPv4 and IPv6 have their destination and source in it
KEEP, DROP = 0xFFFFFFFF, 0

Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand


def program(addresses: list[str], end: tuple[int, int]) -> list[Instruction]:
    """Keeps what goes TO one of `addresses`, or comes FROM one."""
    v4, v6 = _by_version(addresses)
    checks4 = [_compare(words, end[0]) for words in v4]
    checks6 = [_compare(words, end[1]) for words in v6]
    drop: list[Instruction] = [(RETURN, 0, 0, DROP)]
    code4, code6 = [*chain(*checks4), *drop], [*chain(*checks6), *drop]
    return [
        (LOAD_BYTE, 0, 0, IP_HEADER),
        (SHIFT_RIGHT, 0, 0, 4),
        (JUMP_EQUAL, 0, len(code4), 4),
        *code4,
        *code6,
    ]


def _by_version(addresses: list[str]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    parsed = [ipaddress.ip_address(address) for address in addresses]
    words = [struct.unpack(f">{len(each.packed) // 4}I", each.packed) for each in parsed]
    return [w for w in words if len(w) == 1], [w for w in words if len(w) == 4]


# Of this process, by inode.
_restricted: set[int] = set()


def _compare(words: Sequence[int], at: int) -> list[Instruction]:
    """Keep the packet if the words from `at` on are `words`, else go on after this code."""
    code: list[Instruction] = []
    for i, word in enumerate(words):
        to_the_end = 2 * (len(words) - 1 - i) + 1
        code += [(LOAD_WORD, 0, 0, IP_HEADER + at + 4 * i), (JUMP_EQUAL, 0, to_the_end, word)]
    return [*code, (RETURN, 0, 0, KEEP)]


def restrict(sock: socket.socket, address: str, end: tuple[int, int] = TO) -> None:
    """Let only what goes TO `address` or loopback reach `sock`, or comes FROM them.

    Raises OSError.
    """
    code = b"".join(struct.pack("HBBI", *step) for step in program([address, *LOOPBACK], end))
    memory = ctypes.create_string_buffer(code)
    filled = struct.pack("HP", len(code) // 8, ctypes.addressof(memory))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filled)


def open_to_all() -> Iterator[socket.socket]:
    """This process's TCP sockets that listen on every interface; as `listening` yields them."""
    for sock in listening():
        if ipaddress.ip_address(sock.getsockname()[0]).is_unspecified:
            yield sock


def bind(address: str, end: tuple[int, int] = TO) -> None:
    """Restrict what is new of `open_to_all`. A kernel that cannot do it is said in the log."""
    for sock in open_to_all():
        inode = os.fstat(sock.fileno()).st_ino
        if inode in _restricted:
            continue
        _restricted.add(inode)
        try:
            restrict(sock, address, end)
        except OSError as error:
            logger.warning(
                "port %d stays open on every interface, not on %s alone (%s): see docs/security.md",
                sock.getsockname()[1],
                address,
                error.strerror,
            )


def init_distributed_environment(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """SGLang's own, whose TCPStore listens from here on."""
    from sglang.srt.runtime_context import get_parallel

    made = original(*args, **options)
    _bind_all(FROM if get_parallel().nnodes == 1 else TO)
    return made


def initialize(original: Callable[..., Any], engine: Any, *args: Any, **options: Any) -> Any:
    """Of Mooncake, which listens from here on; no memory is registered yet."""
    made = original(engine, *args, **options)
    _bind_all(TO)
    return made


def _bind_all(end: tuple[int, int]) -> None:
    address = HmaConfig.require().bind
    if address is not None:
        bind(address, end)
