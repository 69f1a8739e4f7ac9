"""Stands in place of the module ttnn and writes down every call that the runtime makes.

Shapes alone are computed, so that a model of any size is recorded in seconds. What operations do is
in operations.py; tensors' ways to and from the card, events, queues and traces are in module.py.

While a trace is captured, operations go into it and cost the host nothing when it is replayed: a
replay is one call of the host and the trace's operations. What they cost is computed anew at each
replay, because where a chunk starts may have changed.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmark.tenstorrent.operations import OPERATIONS, Work
from benchmark.tenstorrent.tensors import Looks, Shape, Tensor


@dataclass(frozen=True)
class Call:
    """kind: as Work has it, or upload, download, event, wait, trace, allocate. host: calls that the
    host makes for it. thread: the host's. bytes read and written in DRAM; up, down over PCIe; link
    between chips. weights: what a matmul streams from DRAM, by tensor. program: what ttnn would
    keep a compiled program under."""

    name: str
    kind: str
    thread: str
    host: int = 1
    queue: int = 0
    operands: tuple[Looks, ...] = ()
    results: tuple[Looks, ...] = ()
    reads: int = 0
    writes: int = 0
    flops: int = 0
    fidelity: str = ""
    weights: tuple[tuple[int, int], ...] = ()
    up: int = 0
    down: int = 0
    link: int = 0
    programs: int = 0
    program: Any = None

    @property
    def waits(self) -> bool:
        """Whether the host stands still until the card is done."""
        return self.kind == "wait" or (self.kind == "download" and self.queue == 0)


@dataclass
class _Capture:
    thread: int
    again: list[Callable[[], Call]] = field(default_factory=list)


class Recorder:
    """Calls in the order in which they were made, and the programs that were ever needed."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.programs: set[Any] = set()
        self.traces: dict[int, _Capture] = {}
        self.capture: _Capture | None = None
        self.lock = threading.RLock()
        self.numbers = itertools.count(1)

    def take(self) -> list[Call]:
        """What was called since the last time."""
        with self.lock:
            calls, self.calls = self.calls, []
        return calls

    def note(self, name: str, kind: str, **what: Any) -> None:
        """A call that is no operation. Raises RuntimeError within a trace, which holds operations
        alone; allocations and what the host does by itself are let through."""
        with self.lock:
            capturing = self.capture is not None and self.capture.thread == threading.get_ident()
            if capturing and kind in ("upload", "download", "wait"):
                raise RuntimeError(f"ttnn.{name} while a trace is captured: ttnn refuses it")
            call = Call(name, kind, threading.current_thread().name, **what)
            self.calls.append(call)

    def operate(self, name: str, *args: Any, **options: Any) -> Any:
        operation = OPERATIONS[name]
        operands = list(_tensors((args, list(options.values()))))
        lacking = [each for each in operands if each.memory is None]
        if lacking:
            raise RuntimeError(f"ttnn.{name}: an operand {lacking[0].looks} is on the host")
        plain = {key: value for key, value in options.items() if key not in PLACES}
        work = operation(*args, **options)
        results = self._results(work, operands, options)

        def again() -> Call:
            anew = operation(*args, **options)
            for out, result in zip(anew.outs, results, strict=True):
                result.integers = out.integers
            return self._call(name, anew, operands, results, args, plain)

        call = self._call(name, work, operands, results, args, plain)
        with self.lock:
            self.programs |= {(call.program, part) for part in range(call.programs)}
            if self.capture is not None and self.capture.thread == threading.get_ident():
                self.capture.again.append(again)
            else:
                self.calls.append(call)
        return results[0] if len(results) == 1 else tuple(results) or work.gives

    def _results(
        self, work: Work, operands: list[Tensor], options: Mapping[str, Any]
    ) -> list[Tensor]:
        given = next((options[name] for name in TARGETS if options.get(name) is not None), None)
        if given is not None:
            return [given]
        asked = options.get("memory_config")
        return [
            Tensor(
                Shape(out.shape),
                out.dtype,
                out.layout,
                asked or out.memory,
                operands[0].on,
                out.integers,
            )
            for out in work.outs
        ]

    def _call(
        self,
        name: str,
        work: Work,
        operands: list[Tensor],
        results: list[Tensor],
        args: tuple[Any, ...],
        options: Mapping[str, Any],
    ) -> Call:
        distinct = {each.number: each for each in operands}.values()
        reads = sum(each.dram for each in distinct) if work.reads is None else work.reads
        moves = work.kind != "view"
        config = options.get("compute_kernel_config")
        weight = work.weight
        looks = tuple(each.looks for each in operands), tuple(each.looks for each in results)
        said = repr(([_plain(each) for each in args], sorted(_plain(dict(options)).items())))
        return Call(
            name,
            work.kind,
            threading.current_thread().name,
            operands=looks[0],
            results=looks[1],
            reads=reads if moves else 0,
            writes=(sum(each.dram for each in results) if moves else 0) + work.writes,
            flops=work.flops,
            fidelity=config.math_fidelity if config is not None and work.flops else "",
            weights=((weight.number, weight.dram),) if weight is not None and weight.dram else (),
            link=work.link,
            programs=work.programs,
            program=(name, looks, said) if work.programs else None,
        )

    def begin_trace(self) -> int:
        """Operations of this thread go into a trace from now on; its number."""
        with self.lock:
            if self.capture is not None:
                raise RuntimeError("a trace is being captured already")
            self.note("begin_trace_capture", "trace")
            number = next(self.numbers)
            self.capture = self.traces[number] = _Capture(threading.get_ident())
        return number

    def end_trace(self, number: int) -> None:
        with self.lock:
            if self.capture is not self.traces[number]:
                raise RuntimeError(f"trace {number} is not the one that is being captured")
            self.capture = None
            self.note("end_trace_capture", "trace")

    def replay(self, number: int) -> None:
        with self.lock:
            self.note("execute_trace", "trace")
            self.calls += [replace(again(), host=0) for again in self.traces[number].again]


TARGETS = ("output_tensor", "optional_output_tensor")
PLACES = ("memory_config", *TARGETS)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple) and not isinstance(value, Shape):
        for each in value:
            yield from _tensors(each)


def _plain(value: Any) -> Any:
    """Without tensors, whose looks are noted apart."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
