"""K and V leave the card on its second command queue while later layers compute.

A slot is a host tensor that one tensor of the card's is copied to. It is used again as soon as its
bytes lie in the pool's pages, which are what Mooncake has registered: a copy on the host that ttnn
leaves no way around, on this object's thread and counted. A few parts may be on their way; the
forward waits before it adds another.
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

IN_FLIGHT = 3

# (layer, K or V: 0 or 1, page ids [n], first KV head, bytes [n, kv_heads, head_dim / 32, 1088])
Store = Callable[[int, int, npt.NDArray[np.integer], int, torch.Tensor], None]


def store_pages(
    buffer: torch.Tensor, pages: npt.NDArray[np.integer], head: int, rows: torch.Tensor
) -> None:
    """buffer: uint8 [pages, kv_heads, head_dim / 32, 1088]; rows: [n, h, head_dim / 32, 1088], the
    heads from `head` on of pages `pages`."""
    buffer[torch.from_numpy(pages.astype(np.int64)), head : head + rows.shape[1]] = rows


@dataclass(frozen=True)
class Part:
    """K (0) or V (1) of a layer: a chip's KV heads of the rows that lie in `pages`, 0 for those
    that nobody wants."""

    layer: int
    which: int
    pages: npt.NDArray[np.integer]


@dataclass(frozen=True)
class Outgoing:
    """BFP8 [1, a chip's KV heads * parts, rows, head_dim]: one part's heads after another's."""

    tensor: Any
    parts: tuple[Part, ...]


@dataclass
class _Slot:
    tensor: Any
    bytes: list[torch.Tensor]  # of each chip


@dataclass
class _Batch:
    layers: Sequence[int]
    arrived: Any
    copies: list[tuple[Outgoing, _Slot]]


class Readback:
    """`store` and `layer_stored` are called on a thread of this object's."""

    def __init__(self, card: Card, store: Store, layer_stored: Callable[[int], None]) -> None:
        self.device, self.chips = card.device, card.chips
        self.store, self.layer_stored = store, layer_stored
        self.bytes_stored = 0
        self.free: dict[tuple[int, ...], list[_Slot]] = {}
        self.room = threading.BoundedSemaphore(IN_FLIGHT)
        self.pending: queue.Queue[_Batch | None] = queue.Queue()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="hma-readback", daemon=True)
        self.thread.start()

    def submit(self, outgoing: Sequence[Outgoing], layers: Sequence[int]) -> None:
        """Copies what was enqueued to compute; `layers` are complete once it is stored."""
        import ttnn

        self.room.acquire()
        self._raise()
        computed = ttnn.record_event(self.device, COMPUTE)
        ttnn.wait_for_event(COPY, computed)
        copies = []
        for one in outgoing:
            slot = self._slot(one.tensor)
            ttnn.copy_device_to_host_tensor(one.tensor, slot.tensor, blocking=False, cq_id=COPY)
            copies.append((one, slot))
        self.pending.put(_Batch(layers, ttnn.record_event(self.device, COPY), copies))

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
        while (batch := self.pending.get()) is not None:
            try:
                if self.error is None:
                    self._finish(batch)
            except BaseException as error:  # the forward's thread raises it
                self.error = error
            finally:
                self.room.release()
                self.pending.task_done()

    def _finish(self, batch: _Batch) -> None:
        import ttnn

        ttnn.event_synchronize(batch.arrived)
        while batch.copies:
            one, slot = batch.copies.pop()
            for chip, rows in enumerate(slot.bytes):
                heads = len(rows) // len(one.parts)
                of_parts = rows.view(-1, heads, *rows.shape[1:])
                for part, mine in zip(one.parts, of_parts, strict=True):
                    wanted = np.flatnonzero(part.pages)
                    if len(wanted):
                        bytes_ = mine[:, torch.from_numpy(wanted)].transpose(0, 1)
                        pages = part.pages[wanted]
                        self.store(part.layer, part.which, pages, chip * heads, bytes_)
                        self.bytes_stored += bytes_.numel()
            self.free[tuple(slot.tensor.shape)].append(slot)
        for layer in batch.layers:
            self.layer_stored(layer)
