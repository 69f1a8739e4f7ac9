"""One bucket's place on the card: buffers for its inputs and its residual stream, and its traces.

A trace repeats the calls of some layers with one call of the host. It writes to the addresses it
was captured with, some of which the allocator has given to others since. That is safe because lanes
run one after another: nothing that a lane leaves on the card is read once another lane runs.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hma_kernels import PAGE
from sglang_hma.prefill.ttnn.buckets import LINE, Bucket, Inputs
from sglang_hma.prefill.ttnn.card import COMPUTE, reason
from sglang_hma.prefill.ttnn.model import CORE_BYTES, Block, Cache, PrefillModel
from sglang_hma.prefill.ttnn.readback import IN_FLIGHT, Outgoing, Part
from sglang_hma.prefill.ttnn.shape import BF16, ModelShape

logger = logging.getLogger(__name__)

SEGMENTS = 7
# K and V of a trace's layers stay allocated, in all up to this part of a chip's memory.
TRACES_OF_MEMORY = 12

# (what leaves, the layers that are complete with it)
Leaving = Callable[[Sequence[Outgoing], Sequence[int]], None]
After = Callable[[int, Sequence[Block]], None]


def segments(layers: int) -> list[range]:
    """Layers of each trace: the last one's leaves alone, and each is about half of those before, so
    that what is still to be copied when the last has run is one layer."""
    sizes: list[int] = []
    while (left := layers - sum(sizes)) > 0:
        rest = SEGMENTS - len(sizes)
        sizes.append(min(2 ** len(sizes), max(1, -(-left // rest)), left))
        if rest == 1:
            sizes[-1] = left
    ends = np.cumsum(sizes[::-1]).tolist()
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def input_bytes(bucket: Bucket, width: int) -> int:
    """Of what `Inputs` puts on a chip."""
    return 4 * (3 * bucket.rows + (bucket.slots + 1) * (width + LINE))


def lane_bytes(bucket: Bucket, shape: ModelShape, width: int, *, traced: bool) -> int:
    """What a lane takes of a chip's memory beside the values between operations: its inputs, the
    residual stream, rotary rows, and packed K and V, of all layers with traces."""
    layers = shape.layers if traced else min(shape.layers, IN_FLIGHT + 1)
    row = BF16 * (shape.hidden + 2 * shape.head_dim) + layers * shape.page_bytes // PAGE
    return input_bytes(bucket, width) + bucket.rows * row


def traced_buckets(
    among: Sequence[Bucket], shape: ModelShape, width: int, memory: int
) -> list[Bucket]:
    """Those whose traces have room in a chip's `memory`, the small ones first: a large one computes
    for longer than its calls take."""
    found, left = [], memory // TRACES_OF_MEMORY
    for bucket in sorted(among, key=lambda bucket: (bucket.rows, bucket.slots)):
        left -= lane_bytes(bucket, shape, width, traced=True)
        if left < 0:
            break
        found.append(bucket)
    return found


def memory_of(among: Sequence[Bucket], shape: ModelShape, width: int, memory: int) -> int:
    """What all lanes take of a chip of so much memory."""
    traced = set(traced_buckets(among, shape, width, memory))
    return sum(lane_bytes(each, shape, width, traced=each in traced) for each in among)


class Lane:
    def __init__(self, model: PrefillModel, bucket: Bucket, cache: Cache, width: int) -> None:
        import ttnn

        self.model, self.bucket, self.cache = model, bucket, cache
        self.attention = model.attention_config(bucket)
        row, ints = ttnn.ROW_MAJOR_LAYOUT, torch.int32
        tables = torch.zeros(bucket.slots + 1, width + LINE, dtype=ints)
        rows = torch.zeros(3, bucket.rows, dtype=ints)
        self.rows = model.card.tensor(rows, ttnn.uint32, row)
        self.tables = model.card.tensor(tables, ttnn.int32, row)
        self.core_bytes = CORE_BYTES[0]
        self.traces: list[tuple[range, Any, Any]] = []  # layers, trace, packed K and V
        self.logits: Any = None
        self.kept: list[Block] = []

    def upload(self, inputs: Inputs) -> None:
        import ttnn

        everywhere = ttnn.ReplicateTensorToMesh(self.model.card.device)
        for values, target, dtype in (
            (inputs.rows, self.rows, ttnn.uint32),
            (inputs.tables, self.tables, ttnn.int32),
        ):
            host = ttnn.from_torch(
                torch.from_numpy(values),
                dtype=dtype,
                layout=ttnn.ROW_MAJOR_LAYOUT,
                mesh_mapper=everywhere,
            )
            ttnn.copy_host_to_device_tensor(host, target, cq_id=COMPUTE)

    def run(self, inputs: Inputs, leaving: Leaving) -> Any:
        """Logits on the card: rows as `inputs.lasts` says."""
        if not self.traces:
            return self._last_logits(self.run_eagerly(inputs, leaving))
        import ttnn

        self.upload(inputs)
        pages = self._pages(inputs)
        for layers, trace, packed in self.traces:
            ttnn.execute_trace(self.model.card.device, trace, cq_id=COMPUTE, blocking=False)
            parts = [Part(layer, w, page) for layer in layers for page in pages for w in (0, 1)]
            leaving([Outgoing(packed, tuple(parts))], layers)
        return self.logits

    def run_eagerly(
        self, inputs: Inputs, leaving: Leaving, after: After | None = None
    ) -> list[Block]:
        """Call by call, each layer by itself; the residual stream after the last. `after` is called
        once a layer was enqueued."""
        self.upload(inputs)
        pages = self._pages(inputs)
        self.model.core_bytes = self.core_bytes
        blocks = self.model.blocks(self.bucket, self.rows, self.tables)
        for layer, kv in enumerate(self.cache):
            outgoing = []
            for block, page in zip(blocks, pages, strict=True):
                packed = self.model.layer(layer, block, kv, self.attention)
                outgoing += [Outgoing(packed[w], (Part(layer, w, page),)) for w in (0, 1)]
            leaving(outgoing, [layer])
            if after is not None:
                after(layer, blocks)
        return blocks

    def _pages(self, inputs: Inputs) -> list[npt.NDArray[np.int32]]:
        return np.split(inputs.own_pages, self.bucket.blocks)

    def warm_up(self, leaving: Leaving) -> None:
        """Makes all programs of `run_eagerly` and what follows it; writes to page 0 alone."""
        bucket = self.bucket
        nothing = Inputs(
            np.zeros((3, bucket.rows), np.int32),
            np.zeros((bucket.slots + 1, self.tables.shape[1]), np.int32),
            (),
        )
        for self.core_bytes in CORE_BYTES:
            try:
                blocks = self.run_eagerly(nothing, leaving)
                self.model.output.read_logits(self._last_logits(blocks))
                self.model.output.hidden(blocks[0].x)
                return
            except RuntimeError as error:
                if self.core_bytes == CORE_BYTES[-1]:
                    raise
                logger.info(
                    "%d rows do not fit in the cores' memory with values of %d KB a core: %s",
                    *(self.bucket.rows, self.core_bytes >> 10, reason(error)),
                )

    def capture(self) -> None:
        """Raises RuntimeError, and leaves the lane without traces, if they do not fit."""
        import ttnn

        device, parts = self.model.card.device, segments(len(self.cache))
        self.model.core_bytes = self.core_bytes
        # A program cannot be made while a trace is captured.
        for layers in parts:
            self._segment(layers)
        self.kept = []
        try:
            for layers in parts:
                trace = ttnn.begin_trace_capture(device, cq_id=COMPUTE)
                packed = None
                try:
                    packed = self._segment(layers)
                finally:
                    ttnn.end_trace_capture(device, trace, cq_id=COMPUTE)
                    self.traces.append((layers, trace, packed))
        except RuntimeError:
            self.release()
            raise

    def _segment(self, layers: range) -> Any:
        """These layers' calls, with what comes before the first and after the last: packed K and V
        of all blocks, one layer's after another's."""
        import ttnn

        if layers.start == 0:
            self.kept = self.model.blocks(self.bucket, self.rows, self.tables)
        found: list[Any] = []
        for layer in layers:
            for block in self.kept:
                found += self.model.layer(layer, block, self.cache[layer], self.attention)
        packed = ttnn.concat(found, dim=1, memory_config=ttnn.DRAM_MEMORY_CONFIG)
        if layers.stop == len(self.cache):
            self.logits = self._last_logits(self.kept)
        return packed

    def _last_logits(self, blocks: Sequence[Block]) -> Any:
        return self.model.output.last_logits([block.x for block in blocks], self.rows)

    def release(self) -> None:
        import ttnn

        for _, trace, _ in self.traces:
            ttnn.release_trace(self.model.card.device, trace)
        self.traces, self.logits, self.kept = [], None, []
