"""Which packets reach a socket: a classic BPF program (linux/filter.h), no privilege needed.

A listening socket's filter sees the packet that begins a connection, and each connection that comes
of it keeps the filter that was on then.
"""

import ctypes
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SO_ATTACH_FILTER = 26  # asm-generic/socket.h
LOAD_WORD, LOAD_BYTE, SHIFT_RIGHT, JUMP_EQUAL, JUMP, RETURN = 0x20, 0x30, 0x74, 0x15, 0x05, 0x06
IP_HEADER = 0xFFF00000  # where it begins
TO, FROM = (16, 24), (12, 8)  # where IPv4 and IPv6 have their destination and source in it
KEEP, DROP = 0xFFFFFFFF, 0

Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand
Words = tuple[int, ...]  # of an address: one of IPv4, four of IPv6


@dataclass(frozen=True)
class Only:
    """Packets TO one of `addresses`, or FROM one."""

    addresses: tuple[str, ...]
    end: tuple[int, int]


def program(conditions: Sequence[Only]) -> list[Instruction]:
    """Keeps what fulfils all of `conditions`."""
    code4, code6 = ([*_all_of(conditions, words), (RETURN, 0, 0, KEEP)] for words in (1, 4))
    return [
        (LOAD_BYTE, 0, 0, IP_HEADER),
        (SHIFT_RIGHT, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, 4),
        (JUMP, 0, 0, len(code4)),
        *code4,
        *code6,
    ]


def _all_of(conditions: Sequence[Only], words: int) -> list[Instruction]:
    """For addresses of so many words: goes on after this code, or drops."""
    code: list[Instruction] = []
    for each in conditions:
        at = each.end[0] if words == 1 else each.end[1]
        known = [found for found in map(_words, each.addresses) if len(found) == words]
        code += _one_of(known, at)
    return code


def _words(address: str) -> Words:
    packed = ipaddress.ip_address(address).packed
    return struct.unpack(f">{len(packed) // 4}I", packed)


def _one_of(addresses: Iterable[Words], at: int) -> list[Instruction]:
    code: list[Instruction] = [(RETURN, 0, 0, DROP)]
    for words in addresses:
        code = [*_compare(words, at), (JUMP, 0, 0, len(code)), *code]
    return code


def _compare(words: Words, at: int) -> list[Instruction]:
    """Skips the instruction after this code unless the words from `at` on are `words`."""
    code: list[Instruction] = []
    for i, word in enumerate(words):
        to_the_end = 2 * (len(words) - 1 - i) + 1
        code += [(LOAD_WORD, 0, 0, IP_HEADER + at + 4 * i), (JUMP_EQUAL, 0, to_the_end, word)]
    return code


def attach(sock: socket.socket, *conditions: Only) -> None:
    """Let only what fulfils all of `conditions` reach `sock`, in place of what was said before.

    Raises OSError.
    """
    code = b"".join(struct.pack("HBBI", *step) for step in program(conditions))
    memory = ctypes.create_string_buffer(code)
    filled = struct.pack("HP", len(code) // 8, ctypes.addressof(memory))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filled)
