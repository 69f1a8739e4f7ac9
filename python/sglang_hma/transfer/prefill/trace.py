"""--hma-trace: when layers were computed and groups were on the wire, as a Chrome trace."""

import atexit
import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.prefill.jobs import Group

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
COMPUTE, SEND = 1, 2


class Trace:
    """Writes the JSON array format, whose closing bracket is optional, so that a file that was cut
    off still opens. Without a path nothing is recorded. A full disk ends the trace, after its last
    whole event, and nothing else."""

    def __init__(self, path: Path | None, name: str) -> None:
        self._path = path
        self._events: list[dict[str, Any]] = []
        self._gates: list[LayerGate] = []
        self._flushed_s = time.monotonic()
        if path is None:
            return
        path.write_text("[\n")
        self._meta("process_name", 0, name)
        self._meta("thread_name", COMPUTE, "layers compute")
        self._meta("thread_name", SEND, "groups travel")
        atexit.register(self.flush, final=True)

    @classmethod
    def from_config(cls, name: str, rank: int) -> "Trace":
        """Each tensor-parallel rank writes its own file: FILE.json, FILE.1.json, ..."""
        path = Path(given) if (given := HmaConfig.require().trace) else None
        if path is not None and rank:
            path = path.with_suffix(f".{rank}{path.suffix}")
        return cls(path, name)

    def _meta(self, kind: str, thread: int, name: str) -> None:
        self._events.append(
            {"ph": "M", "name": kind, "pid": os.getpid(), "tid": thread, "args": {"name": name}}
        )

    def forward(self, gate: LayerGate) -> None:
        """A forward pass, whose layers are written once it has ended."""
        if self._path is not None and gate not in self._gates:
            self._gates.append(gate)

    def group(self, group: Group, end_s: float) -> None:
        """A group that has just left the wire; `end_s` is of time.perf_counter()."""
        if self._path is None:
            return
        first = min(layers.first_layer for layers in group.ranges)
        last = max(layers.end_layer for layers in group.ranges) - 1
        self._span(
            SEND,
            f"layers {first}-{last}" if last > first else f"layer {first}",
            group.started_s,
            end_s,
            bytes=group.bytes,
            rooms=sorted({str(layers.job.room) for layers in group.ranges}),
            failed=group.failed,
        )

    def _span(self, thread: int, name: str, begin_s: float, end_s: float, **args: Any) -> None:
        span = {"ph": "X", "name": name, "pid": os.getpid(), "tid": thread, "args": args}
        times = {"ts": round(begin_s * 1e6, 1), "dur": round((end_s - begin_s) * 1e6, 1)}
        self._events.append(span | times)

    def flush(self, *, final: bool = False) -> None:
        """Append what is complete to the file, at most once a second."""
        now = time.monotonic()
        if self._path is None or (now - self._flushed_s < FLUSH_S and not final):
            return
        self._flushed_s = now
        for gate in [gate for gate in self._gates if gate.ended_s is not None]:
            self._gates.remove(gate)
            begin = gate.opened_s
            for layer, end in enumerate(gate.layer_times_s):
                self._span(COMPUTE, f"layer {layer}", begin, end)
                begin = end
            if gate.ended_s is not None and gate.ended_s > begin:
                self._span(COMPUTE, "rest", begin, gate.ended_s)
        events, self._events = self._events, []
        self._append("".join(json.dumps(event) + ",\n" for event in events))

    def _append(self, lines: str) -> None:
        path = self._path
        assert path is not None
        size = None
        try:
            size = path.stat().st_size
            with path.open("a") as file:
                file.write(lines)
        except OSError as error:
            self._path = None
            self._gates.clear()
            logger.error(
                "--hma-trace %s: %s, so the trace ends here; make room and restart the server "
                "for another",
                path,
                error.strerror,
            )
            with contextlib.suppress(OSError):
                if size is not None:
                    os.truncate(path, size)
