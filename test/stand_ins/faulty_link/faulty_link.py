"""A Mooncake link with faults that a test switches on while the server runs.

HMA_TEST_FAULTS names a JSON file, read again whenever it is replaced:
  flip        probability that one byte of an acknowledged write is changed on the far side
  slow_s      every write is reported done this much later
  hold_after  after so many writes none is reported done; the file FILE.held says that one waits
  hold_peers  if true, none is that goes to a peer which `hold_after` has kept a write of
  lease_s     how long a decode server may be silent (the product's own, if it is not given)
"""

import ctypes
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from sglang_hma.transfer.claims import Claims
from sglang_hma.transfer.prefill.link import MooncakeLink

LEASE_S = Claims.LEASE_S


def register() -> None:
    from sglang_hma.transfer.prefill import manager

    manager.MooncakeLink = FaultyLink


class FaultyLink(MooncakeLink):
    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.engine = engine
        self.path = Path(os.environ["HMA_TEST_FAULTS"])
        self.held = self.path.with_name(f"{self.path.name}.held")
        self.read_at = -1
        self.faults: dict[str, float] = {}
        self.writes: dict[int, tuple[str, int, int, int]] = {}
        self.done: dict[int, tuple[str, float]] = {}  # its peer, when it is reported
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
        handle = super().submit(session, source, target, length)
        self.writes[handle] = session, source, target, length
        return handle

    def check(self, handle: int) -> int:
        if handle not in self.done:
            status = super().check(handle)
            if status == 0:
                return 0
            write = self.writes.pop(handle)
            if status < 0:
                return status
            self.done[handle] = write[0], time.monotonic() + (self.fault("slow_s") or 0)
            # Not the metadata, whose writes are short: checksums are for pages.
            if write[3] >= 1088 and random.random() < (self.fault("flip") or 0):
                self.flip(*write)
        session, done_s = self.done[handle]
        if self.holds(session) or time.monotonic() < done_s:
            return 0
        del self.done[handle]
        self.ended += 1
        return 1

    def holds(self, session: str) -> bool:
        after = self.fault("hold_after")
        if after is None or self.ended < after:
            return session in self.held_peers
        self.held_peers.add(session)
        self.held.touch()
        return True

    def flip(self, session: str, source: int, target: int, length: int) -> None:
        at = random.randrange(length)
        self.scratch[0] = ctypes.c_uint8.from_address(source + at).value ^ random.randrange(1, 256)
        scratch = self.scratch.ctypes.data
        assert self.engine.transfer_sync_write(session, scratch, target + at, 1) == 0
