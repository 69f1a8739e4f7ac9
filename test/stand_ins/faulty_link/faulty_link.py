"""A Mooncake link with faults that a test switches on while the server runs.

HMA_TEST_FAULTS names a JSON file, read again whenever it changes:
  flip     probability that one byte of an acknowledged write is changed on the far side
  slow_s   every write is reported done this much later
"""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np


def register() -> None:
    from sglang_hma.transfer.prefill import manager

    manager.MooncakeLink = FaultyLink


class FaultyLink:
    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.path = Path(os.environ["HMA_TEST_FAULTS"])
        self.read_at = -1.0
        self.faults: dict[str, float] = {}
        self.writes: dict[int, tuple[str, int, int, int]] = {}
        self.done: dict[int, float] = {}
        self.scratch = np.zeros(1, dtype=np.uint8)
        assert engine.register_memory(self.scratch.ctypes.data, 1) == 0

    def fault(self, name: str) -> float:
        changed = self.path.stat().st_mtime
        if changed != self.read_at:
            self.faults, self.read_at = json.loads(self.path.read_text()), changed
        return self.faults.get(name, 0.0)

    def submit(self, session: str, source: int, target: int, length: int) -> int:
        handle = int(self.engine.transfer_submit_write(session, source, target, length))
        self.writes[handle] = session, source, target, length
        return handle

    def check(self, handle: int) -> int:
        if handle not in self.done:
            status = int(self.engine.transfer_check_status(handle))
            if status == 0:
                return 0
            write = self.writes.pop(handle)
            if status < 0:
                return status
            self.done[handle] = time.monotonic() + self.fault("slow_s")
            # Not the metadata, whose writes are short: checksums are for pages.
            if write[3] >= 1088 and random.random() < self.fault("flip"):
                self.flip(*write)
        if time.monotonic() < self.done[handle]:
            return 0
        del self.done[handle]
        return 1

    def flip(self, session: str, source: int, target: int, length: int) -> None:
        import ctypes

        at = random.randrange(length)
        self.scratch[0] = ctypes.c_uint8.from_address(source + at).value ^ random.randrange(1, 256)
        scratch = self.scratch.ctypes.data
        assert self.engine.transfer_sync_write(session, scratch, target + at, 1) == 0
