"""What the send thread works on: jobs, ranges of their layers, and groups of those on the wire."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

from sglang_hma.kvcache.format import FULL
from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.messages import Landed
from sglang_hma.transfer.page_slices import Block, LayerSlices, PageRun, SlicePair


@dataclass(frozen=True)
class EarlySend:
    """Pages that are queued before the forward pass of their batch: `gate` says which of their
    layers are final, `forward` is the batch's own gate."""

    gate: LayerGate
    forward: LayerGate


@dataclass(eq=False)
class Job:
    """Some pages of one request for one peer, in layers next_layer..end_layer-1 of their kind.

    `first_page` is the index of the first page in the request's list of such pages. `metadata` is
    written with the last group.
    """

    room: int
    session: str
    first_page: int
    runs: Sequence[PageRun]
    slices: LayerSlices
    gate: LayerGate
    metadata: Sequence[Block] = ()
    last: bool = False
    attempt: int = 0  # how often its range was sent before
    next_layer: int = 0
    end_layer: int = -1
    in_flight: int = 0  # groups
    dropped: bool = False
    kind: int = FULL

    def __post_init__(self) -> None:
        if self.end_layer < 0:
            self.end_layer = len(self.slices)

    # Asked at every step of the send thread, and a long prompt has thousands of runs.

    @cached_property
    def layer_bytes(self) -> int:
        return sum(pair.length for pair in self.slices[0]) * self.pages

    @cached_property
    def layer_blocks(self) -> int:
        return sum(pair.block_count(self.runs) for pair in self.slices[0])

    @cached_property
    def pages(self) -> int:
        return sum(run.pages for run in self.runs)

    @property
    def submitted(self) -> bool:
        """Whether no layer is left to submit."""
        return self.dropped or self.next_layer == self.end_layer

    @property
    def done(self) -> bool:
        """Whether no write of it is left, on the wire or to come."""
        return self.submitted and self.in_flight == 0


@dataclass(eq=False)
class LayerRange:
    """Consecutive layers of one job in one group. `announcement` is sent when they have landed."""

    job: Job
    first_layer: int
    layers: int
    announcement: "Future[Landed] | None" = None

    @property
    def end_layer(self) -> int:
        return self.first_layer + self.layers

    @property
    def slices(self) -> list[SlicePair]:
        """K and V of each layer in turn."""
        layers = self.job.slices[self.first_layer : self.end_layer]
        return [pair for layer in layers for pair in layer]

    @property
    def bytes(self) -> int:
        return sum(pair.length for pair in self.slices) * self.job.pages

    def blocks(self) -> list[Block]:
        return [block for pair in self.slices for block in pair.blocks(self.job.runs)]


@dataclass(eq=False)
class Group:
    """Layer ranges that are written to one peer together.

    `blocks` are those that are not submitted yet, `handles` those that are on the wire, 0 where
    the link refused one, both in the order in which they leave.
    """

    ranges: list[LayerRange]
    blocks: deque[Block]
    bytes: int
    started_s: float
    handles: deque[int] = field(default_factory=deque)
    failed: bool = False

    @property
    def ended(self) -> bool:
        return not self.blocks and not self.handles
