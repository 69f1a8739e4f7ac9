"""Batches through the lanes of a card, and their pages to the host."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from sglang_hma.prefill.ttnn.buckets import Group, Inputs, buckets, inputs, pack, table_width
from sglang_hma.prefill.ttnn.card import reason
from sglang_hma.prefill.ttnn.chunk import Chunk
from sglang_hma.prefill.ttnn.lane import Lane, traced_buckets
from sglang_hma.prefill.ttnn.model import Block, Cache, PrefillModel
from sglang_hma.prefill.ttnn.readback import Outgoing, Readback, Store

logger = logging.getLogger(__name__)


class Runner:
    """layer_stored(layer): all pages of the running forward are on the host in that layer.

    chunk_tokens: new tokens of a batch at most; more are taken, in several passes.
    """

    def __init__(
        self,
        model: PrefillModel,
        cache: Cache,
        store: Store,
        layer_stored: Callable[[int], None],
        *,
        chunk_tokens: int,
    ) -> None:
        self.model = model
        self.buckets = buckets(chunk_tokens)
        self.width = table_width(model.context, self.buckets)
        self.lanes = {bucket: Lane(model, bucket, cache, self.width) for bucket in self.buckets}
        self.readback = Readback(model.card, store, layer_stored)
        self.programs_at_start: int | None = None

    def warm_up(self, *, traces: bool) -> None:
        """Makes every program that a batch may need, so that none is compiled while requests wait,
        and the traces of the buckets that have room for them."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        begin = time.perf_counter()
        lanes = sorted(self.lanes.values(), key=lambda lane: lane.bucket.rows)
        for lane in tqdm(lanes, desc="programs of the card", unit="bucket", leave=False):
            lane.warm_up(self._leaving(final=False))
            self.readback.drain()
        head = self.model.shape.hidden
        self.model.output.logits(torch.zeros(1, head, dtype=torch.bfloat16))
        if traces:
            self._capture()
        self.programs_at_start = self.model.card.programs
        logger.info(
            "%d buckets, %d with traces, %d programs in %.1f s",
            len(lanes),
            sum(bool(lane.traces) for lane in lanes),
            self.programs_at_start,
            time.perf_counter() - begin,
        )

    def _capture(self) -> None:
        model = self.model
        room = self.buckets, model.part, self.width, model.card.dram.total
        for lane in (self.lanes[bucket] for bucket in traced_buckets(*room)):
            try:
                lane.capture()
            except RuntimeError as error:
                logger.warning(
                    "no room for the trace of %d rows: larger batches go call by call (%s)",
                    lane.bucket.rows,
                    reason(error),
                )
                return

    def last_logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """BF16 [chunks, vocab] of each chunk's last token; returns when all pages are stored."""
        found = torch.empty(len(chunks), self.model.shape.vocab, dtype=torch.bfloat16)

        def take(lane: Lane, group: Group, given: Inputs, final: bool) -> None:
            logits = lane.run(given, self._leaving(final))
            if given.lasts:
                rows = self.model.output.read_logits(logits)
                for chunk, row in given.lasts:
                    found[chunk] = rows[row]

        self._each_group(chunks, take)
        return found

    def hidden(
        self, chunks: Sequence[Chunk], residuals: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Normed hidden states of each chunk's tokens, BF16 [n, hidden]. `residuals` gets what the
        first chunk's residual stream is after each layer, [n, hidden]."""
        output, size = self.model.output, self.model.shape.hidden

        def rows() -> list[torch.Tensor]:
            return [torch.empty(len(c.tokens), size, dtype=torch.bfloat16) for c in chunks]

        found = rows()
        streams: defaultdict[int, list[torch.Tensor]] = defaultdict(rows)

        def note(group: Group, layer: int, blocks: Sequence[Block]) -> None:
            _spread(group, [output.read(block.x) for block in blocks], chunks, streams[layer])

        def take(lane: Lane, group: Group, given: Inputs, final: bool) -> None:
            after = None if residuals is None else partial(note, group)
            blocks = lane.run_eagerly(given, self._leaving(final), after)
            _spread(group, [output.hidden(block.x) for block in blocks], chunks, found)

        self._each_group(chunks, take)
        if residuals is not None:
            residuals += [streams[layer][0] for layer in sorted(streams)]
        return found

    def _each_group(
        self, chunks: Sequence[Chunk], take: Callable[[Lane, Group, Inputs, bool], None]
    ) -> None:
        groups = pack(chunks, self.buckets)
        try:
            for number, group in enumerate(groups, 1):
                given = inputs(group, chunks, self.width, self.model.context)
                take(self.lanes[group.bucket], group, given, number == len(groups))
                # What a lane leaves on the card is not safe from another lane.
                self.readback.drain()
        finally:
            self.readback.drain()

    def _leaving(self, final: bool) -> Callable[[Sequence[Outgoing], Sequence[int]], None]:
        """Of several passes, a layer is complete with the last."""

        def leave(outgoing: Sequence[Outgoing], layers: Sequence[int]) -> None:
            self.readback.submit(outgoing, layers if final else ())

        return leave

    def facts(self) -> dict[str, Any]:
        now, start = self.model.card.programs, self.programs_at_start
        return {
            "buckets": len(self.lanes),
            "traces": sum(bool(lane.traces) for lane in self.lanes.values()),
            "programs": now,
            "programs_after_start": None if start is None else now - start,
            "host_copied_bytes": self.readback.bytes_stored,
        }

    def close(self) -> None:
        self.readback.close()
        for lane in self.lanes.values():
            lane.release()


def _spread(
    group: Group,
    blocks: Sequence[torch.Tensor],
    chunks: Sequence[Chunk],
    target: Sequence[torch.Tensor],
) -> None:
    """From rows of a group's blocks to each chunk's tokens."""
    rows = torch.cat(list(blocks))
    for number, slot in enumerate(group.slots):
        begin = number * group.bucket.tokens + chunks[slot.chunk].start + slot.first - slot.start
        length = slot.last - slot.first
        target[slot.chunk][slot.first : slot.last] = rows[begin : begin + length]
