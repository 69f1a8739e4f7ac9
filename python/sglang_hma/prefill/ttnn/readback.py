"""K and V leave the card on its second command queue, layer by layer, while later layers compute.

A slot is a host tensor that one layer's K or V of one chunk is copied to. It is used again as soon
as its bytes lie in the pool's pages, which are what Mooncake has registered. A few layers may be on
their way; the forward waits before it adds another.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sglang_hma.prefill.ttnn.card import COMPUTE, COPY, Card
from sglang_hma.prefill.ttnn.tiles import tile_bytes

LAYERS_IN_FLIGHT = 3

# (layer, K or V: 0 or 1, page ids [n], first KV head, bytes [n, kv_heads, head_dim / 32, 1088])
Store = Callable[[int, int, npt.NDArray[np.integer], int, torch.Tensor], None]


def store_pages(
    buffer: torch.Tensor, pages: npt.NDArray[np.integer], head: int, rows: torch.Tensor
) -> None:
    """buffer: uint8 [pages, kv_heads, head_dim / 32, 1088]; rows: [n, h, head_dim / 32, 1088], the
    heads from `head` on of pages `pages`."""
    buffer[torch.from_numpy(pages.astype(np.int64)), head : head + rows.shape[1]] = rows


@dataclass
class _Slot:
    tensor: Any
    bytes: list[torch.Tensor]  # of each chip


@dataclass
class _Layer:
    index: int
    arrived: Any
    copies: list[tuple[int, npt.NDArray[np.integer], _Slot]]
    sources: list[Any]  # stay allocated on the card until they were copied


class Readback:
    """`store` and `layer_stored` are called on a thread of this object's."""

    def __init__(self, card: Card, store: Store, layer_stored: Callable[[int], None]) -> None:
        self.device, self.chips = card.device, card.chips
        self.store, self.layer_stored = store, layer_stored
        self.free: dict[tuple[int, ...], list[_Slot]] = {}
        self.room = threading.BoundedSemaphore(LAYERS_IN_FLIGHT)
        self.pending: queue.Queue[_Layer | None] = queue.Queue()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="hma-readback", daemon=True)
        self.thread.start()

    def submit(
        self,
        layer: int,
        chunks: Sequence[tuple[npt.NDArray[np.integer], tuple[Any, Any]]],
    ) -> None:
        """chunks: (page ids, (K, V)) with K, V BFP8 [1, kv_heads, tokens, head_dim] on each
        chip."""
        import ttnn

        self.room.acquire()
        self._raise()
        computed = ttnn.record_event(self.device, COMPUTE)
        ttnn.wait_for_event(COPY, computed)
        copies, sources = [], []
        for pages, pair in chunks:
            for which, source in enumerate(pair):
                slot = self._slot(source)
                ttnn.copy_device_to_host_tensor(source, slot.tensor, blocking=False, cq_id=COPY)
                copies.append((which, pages, slot))
                sources.append(source)
        self.pending.put(_Layer(layer, ttnn.record_event(self.device, COPY), copies, sources))

    def drain(self) -> None:
        """Wait until everything that was submitted is stored; raise what went wrong there."""
        self.pending.join()
        self._raise()

    def close(self) -> None:
        self.pending.put(None)
        self.thread.join()

    def _raise(self) -> None:
        if self.error is not None:
            raise RuntimeError("reading K and V from the card failed") from self.error

    def _slot(self, source: Any) -> _Slot:
        import ttnn

        shape = tuple(source.shape)
        free = self.free.setdefault(shape, [])
        if free:
            return free.pop()
        tensor = ttnn.allocate_tensor_on_host(
            ttnn.Shape(shape), ttnn.bfloat8_b, ttnn.TILE_LAYOUT, self.device
        )
        return _Slot(tensor, [tile_bytes(tensor, shape, chip) for chip in range(self.chips)])

    def _run(self) -> None:
        while (layer := self.pending.get()) is not None:
            try:
                if self.error is None:
                    self._finish(layer)
            except BaseException as error:  # the forward's thread raises it
                self.error = error
            finally:
                self.room.release()
                self.pending.task_done()

    def _finish(self, layer: _Layer) -> None:
        import ttnn

        ttnn.event_synchronize(layer.arrived)
        layer.sources.clear()
        for which, pages, slot in layer.copies:
            for chip, rows in enumerate(slot.bytes):
                first = chip * len(rows)
                of_pages = rows[:, : len(pages)].transpose(0, 1)
                self.store(layer.index, which, pages, first, of_pages)
            self.free[tuple(slot.tensor.shape)].append(slot)
        self.layer_stored(layer.index)
