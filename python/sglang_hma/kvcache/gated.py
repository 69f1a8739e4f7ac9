"""Pools that tell a LayerGate when a layer's rows are stored."""

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

if TYPE_CHECKING:
    from sglang_hma.transfer.gates import LayerGate


class GatedPool:
    """`layer_gate` is set while a prefill batch runs whose pages leave layer by layer."""

    device: Any
    layer_num: int
    layer_gate: "LayerGate | None" = None

    def layer_stored(self, layer: int) -> None:
        """Every row of `layer` (from 0) that this forward stores is in its page."""
        if self.layer_gate is not None:
            self.layer_gate.advance(layer, self._event())

    def _event(self) -> Any:
        """None on a CPU, whose stores are done when they return."""
        if torch.device(self.device).type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


class NativeKVPool(GatedPool, MHATokenToKVPool):
    """SGLang's own pool, for pipelined transfer without BFP8."""

    def set_kv_buffer(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().set_kv_buffer(layer, *args, **kwargs)
        override = kwargs.get("layer_id_override")
        layer_id = layer.layer_id if override is None else override
        self.layer_stored(layer_id - self.start_layer)
