"""A Mooncake link with faults that a test switches on while the server runs.

HMA_TEST_FAULTS names a JSON file, read again whenever it is replaced:
  flip        probability that one byte of an acknowledged write of pages is changed on the far
              side
  flip_rows   the same of metadata, whose writes are short
  slow_s      every write is reported done this much later
  hold_after  after so many writes none is reported done; the file FILE.held says that one waits,
              and lists the peers to which writes began since
  hold_peers  if true, none is that goes to a peer that the `hold_after` before it listed
  lease_s     how long a decode server may be silent (the product's own, if it is not given)
"""

import contextlib
import ctypes
import itertools
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_hma.transfer.claims import Claims
from sglang_hma.transfer.prefill.link import MooncakeLink

LEASE_S = Claims.LEASE_S


def register() -> None:
    from sglang_hma.transfer.prefill import manager

    manager.MooncakeLink = FaultyLink


@dataclass
class Write:
    """`handle` is Mooncake's, which it gives to another write once this one has ended."""

    handle: int
    session: str
    source: int
    target: int
    length: int
    began: int  # under which file
    done_s: float | None = None  # when it is reported


class FaultyLink(MooncakeLink):
    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.engine = engine
        self.path = Path(os.environ["HMA_TEST_FAULTS"])
        self.held = self.path.with_name(f"{self.path.name}.held")
        self.read_at = -1
        self.faults: dict[str, float] = {}
        self.handles = itertools.count(1)
        self.writes: dict[int, Write] = {}
        self.ended = 0  # since the file was replaced
        self.held_peers: set[str] = set()
        self.scratch = np.zeros(1, dtype=np.uint8)
        assert engine.register_memory(self.scratch.ctypes.data, 1) == 0

    def fault(self, name: str) -> float | None:
        changed = self.path.stat().st_mtime_ns
        if changed != self.read_at:
            self.faults, self.read_at, self.ended = json.loads(self.path.read_text()), changed, 0
            Claims.LEASE_S = self.faults.get("lease_s", LEASE_S)
            if not self.faults.get("hold_peers"):
                self.held_peers.clear()
        return self.faults.get(name)

    def submit(self, session: str, source: int, target: int, length: int) -> int:
        self.fault("")  # reads the file
        handle = super().submit(session, source, target, length)
        if not handle:
            return 0
        own = next(self.handles)
        self.writes[own] = Write(handle, session, source, target, length, self.read_at)
        return own

    def check(self, handle: int) -> int:
        write = self.writes[handle]
        if write.done_s is None:
            status = super().check(write.handle)
            if status < 0:
                del self.writes[handle]
            if status <= 0:
                return status
            write.done_s = time.monotonic() + (self.fault("slow_s") or 0)
            kind = "flip" if write.length >= 1088 else "flip_rows"
            if random.random() < (self.fault(kind) or 0):
                self.flip(write)
        if self.holds(write) or time.monotonic() < write.done_s:
            return 0
        del self.writes[handle]
        self.ended += 1
        return 1

    def holds(self, write: Write) -> bool:
        after = self.fault("hold_after")
        if after is None or self.ended < after:
            return write.session in self.held_peers
        if write.began == self.read_at:
            self.held_peers.add(write.session)
        told = "\n".join(sorted(self.held_peers))
        with contextlib.suppress(FileNotFoundError):
            if self.held.read_text() == told:
                return True
        self.held.write_text(told)
        return True

    def flip(self, write: Write) -> None:
        at = random.randrange(write.length)
        byte = ctypes.c_uint8.from_address(write.source + at).value
        self.scratch[0] = byte ^ random.randrange(1, 256)
        scratch = self.scratch.ctypes.data
        assert self.engine.transfer_sync_write(write.session, scratch, write.target + at, 1) == 0
