"""A pytest plugin: the AVX-512 kernels of HMA_TEST_EXTENSION run in Bochs' Sapphire Rapids.

The guest's memory is this process's, address for address: 1 GiB pages map what /proc/self/maps
names to guest frames, and a frame is bound to the host's page when it is first touched. A call
starts at the function with the host's arguments and ends when it returns to a HLT.
"""

import ctypes
import mmap
import os
import sys

import bochscpu
import pytest
from bochscpu.cpu import set_long_mode
from bochscpu.memory import page_insert

PAGE = 4096
GIB = 1 << 30
STACK = 64 * PAGE
REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
CODE, DATA = 0xA09B, 0xC093  # 64-bit ring 0 segments
PRESENT, LARGE = 0x7, 0x80
SYS_ARCH_PRCTL, ARCH_GET_FS = 158, 0x1003
AVX512_STATE = 0xE7

Table = ctypes.c_uint64 * 512
Run = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64 * 6), ctypes.c_void_p,
    ctypes.c_int64,
)  # fmt: skip


def segment(selector: int, attributes: int, base: int = 0) -> bochscpu.Segment:
    result = bochscpu.Segment()
    result.present, result.selector, result.attr = True, selector, attributes
    result.base, result.limit = base, 0xFFFFFFFF
    return result


class Guest:
    def __init__(self) -> None:
        self._memory: list[mmap.mmap] = []
        self._frames = 1  # guest pages of the first GiB: page tables
        self._host_gib: list[int | None] = [None]  # of each guest GiB
        self._mapped: set[int] = set()
        self._directories: dict[int, ctypes.Array[ctypes.c_uint64]] = {}
        self._root_frame, self._root = self._table()
        self._stack = self._allocate(STACK) + STACK
        self._halt = self._allocate(PAGE)
        ctypes.memset(self._halt, 0xF4, 1)
        self._failure = ""
        self._session = bochscpu.Session()
        self._session.missing_page_handler = self._bind
        self._hook = bochscpu.Hook()
        self._hook.hlt = lambda session, cpu: session.stop()
        self._hook.exception = self._fail
        self._state = self._initial_state()

    def _allocate(self, size: int) -> int:
        self._memory.append(mmap.mmap(-1, size))
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory[-1]))

    def _table(self) -> tuple[int, "ctypes.Array[ctypes.c_uint64]"]:
        host, frame = self._allocate(PAGE), self._frames * PAGE
        self._frames += 1
        page_insert(frame, host)
        return frame, Table.from_address(host)

    def _initial_state(self) -> bochscpu.State:
        state = bochscpu.State()
        set_long_mode(state)
        state.cr3 = self._root_frame
        state.cr4 |= 1 << 9 | 1 << 10 | 1 << 18  # OSFXSR, OSXMMEXCPT, OSXSAVE
        state.xcr0 = AVX512_STATE
        state.mxcsr, state.mxcsr_mask, state.rflags = 0x1F80, 0xFFFF, 2
        state.cs = segment(0x30, CODE)
        state.ds = state.ss = state.es = state.gs = segment(0x28, DATA)
        fs = ctypes.c_ulong()
        ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_GET_FS, ctypes.byref(fs))
        state.fs = segment(0x28, DATA, fs.value)
        return state

    def _map(self) -> None:
        with open("/proc/self/maps") as maps:
            spans = [line.split(maxsplit=1)[0].split("-") for line in maps]
        for start, end in spans:
            first, last = int(start, 16), int(end, 16) - 1
            for gib in range(first // GIB, last // GIB + 1) if first < 1 << 47 else ():
                if gib not in self._mapped:
                    self._map_gib(gib)

    def _map_gib(self, gib: int) -> None:
        top, entry = divmod(gib, 512)
        if top not in self._directories:
            frame, self._directories[top] = self._table()
            self._root[top] = frame | PRESENT
        self._directories[top][entry] = len(self._host_gib) * GIB | PRESENT | LARGE
        self._host_gib.append(gib)
        self._mapped.add(gib)

    def _bind(self, address: int) -> None:
        guest_gib, offset = divmod(address & -PAGE, GIB)
        gib = self._host_gib[guest_gib] if guest_gib < len(self._host_gib) else None
        if gib is None:
            os.abort()  # Bochs has no way to refuse
        page_insert(address & -PAGE, gib * GIB + offset)

    def _fail(self, session: bochscpu.Session, cpu: int, vector: int, code: int) -> None:
        at, cr2 = session.cpu.rip, session.cpu.cr2
        bytes_there = ctypes.string_at(at, 12).hex(" ")
        self._failure = f"exception {vector} ({code}) at {at:#x} ({bytes_there}), cr2 {cr2:#x}"
        session.stop()

    def call(self, function: int, registers: list[int], stack: bytes) -> int:
        """rax of function(registers..., stack); raises RuntimeError for a CPU's exception."""
        self._map()
        top = (self._stack - 256 - len(stack)) & -64
        ctypes.memmove(top, stack, len(stack))
        ctypes.c_uint64.from_address(top - 8).value = self._halt
        state = self._state
        for name, value in zip(REGISTERS, registers, strict=True):
            setattr(state, name, value & (1 << 64) - 1)
        state.rip, state.rsp = function, top - 8
        self._failure = ""
        self._session.cpu.state = state
        self._session.run([self._hook])
        if self._failure:
            raise RuntimeError(self._failure)
        return int(self._session.cpu.state.rax)


guest = Guest()


@Run
def run(function, registers, stack, stack_bytes):
    try:
        return guest.call(function, list(registers.contents), ctypes.string_at(stack, stack_bytes))
    except BaseException as error:  # nothing can pass through C++
        print(f"bochs: {error!r}", flush=True)
        os.abort()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[status] = exitstatus


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Bochs' destructors fault."""
    sys.stdout.flush()
    os._exit(config.stash.get(status, 1))


status = pytest.StashKey[int]()
ctypes.CDLL(os.environ["HMA_TEST_EXTENSION"]).hma_set_emulator(run)
