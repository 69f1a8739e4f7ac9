"""LayerGate: which layers of one forward pass have their K and V pages final.

The scheduler opens a gate before a prefill batch runs and hands it to the pool;
the pool completes a layer as soon as that layer's rows are stored. Transfer
threads send the layers that are complete while later ones still compute.

A gate always ends: `finish` when the forward returned, `fail` when it raised. So
nothing that waits on one waits for ever.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from typing_extensions import override


class LayerGate:
    """One writer (the forward's thread), any number of readers.

    `wake` is called whenever `ready` may have grown or the gate has ended. On a
    device, `advance` and `finish` take the event recorded after the stores; a
    layer counts as ready once its event and all earlier ones have completed.
    """

    def __init__(self, layers: int, wake: Callable[[], None] = lambda: None) -> None:
        if layers < 1:
            raise ValueError(f"a gate needs at least one layer, not {layers}")
        self.layers = layers
        self.error: str | None = None
        self.opened_s = time.perf_counter()
        self.ended_s: float | None = None
        self._lock = threading.Lock()
        self._ready = 0
        self._times: list[float] = []
        self._events: deque[tuple[int, Any]] = deque()
        self._wake = wake

    @classmethod
    def open(cls, layers: int) -> "LayerGate":
        """A gate whose pages are final already: a cached prefix."""
        gate = cls(layers)
        gate.finish()
        return gate

    def advance(self, layer: int, event: Any = None) -> None:
        """Layer `layer` (from 0) and all before it are stored."""
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer {layer} of a gate with {self.layers} layers")
        self._reach(layer + 1, event)

    def finish(self, event: Any = None) -> None:
        """The forward is over: every layer is stored."""
        self.ended_s = time.perf_counter()
        self._reach(self.layers, event)

    def fail(self, reason: str) -> None:
        """The forward raised; layers that were not ready never will be."""
        with self._lock:
            self.error = self.error or reason
            self.ended_s = time.perf_counter()
        self._wake()

    def _reach(self, count: int, event: Any) -> None:
        with self._lock:
            if event is not None:
                self._events.append((count, event))
            elif self._events:
                self._events.append((count, None))
            else:
                self._grow(count)
        self._wake()

    def _grow(self, count: int) -> None:
        now = time.perf_counter()
        self._times.extend([now] * (count - self._ready))
        self._ready = max(self._ready, count)

    @property
    def ready(self) -> int:
        """Layers 0..ready-1 may be read by another thread."""
        with self._lock:
            while self._events and (self._events[0][1] is None or self._events[0][1].query()):
                self._grow(self._events.popleft()[0])
            return self._ready

    @property
    def waits_for_device(self) -> bool:
        """Whether `ready` grows without a call of `wake`: readers must poll."""
        return bool(self._events)

    @property
    def layer_times_s(self) -> tuple[float, ...]:
        """`time.perf_counter()` at which each ready layer became ready."""
        return tuple(self._times)


class GatedPool:
    """`layer_gate` is set while a prefill batch runs whose pages leave layer by layer.

    between_layers: called on the forward's thread after each layer, beside a gate.
    """

    device: Any
    layer_num: int
    layer_gate: LayerGate | None = None
    between_layers: Callable[[], object] | None = None

    def layer_stored(self, layer: int) -> None:
        """Every row of `layer` (from 0) that this forward stores is in its page."""
        if self.layer_gate is not None:
            self.layer_gate.advance(layer, self._event())
            if self.between_layers is not None:
                self.between_layers()

    def _event(self) -> Any:
        """None on a CPU, whose stores are done when they return."""
        if torch.device(self.device).type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


class NativeKVPool(GatedPool, MHATokenToKVPool):
    """SGLang's own pool, for pipelined transfer without BFP8."""

    @override
    def set_kv_buffer(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().set_kv_buffer(layer, *args, **kwargs)
        override = kwargs.get("layer_id_override")
        layer_id = layer.layer_id if override is None else override
        self.layer_stored(layer_id - self.start_layer)
