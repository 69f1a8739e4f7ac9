"""How long a call of the CUDA decode kernel takes if it only ever waits for memory.

Memory is a fluid that warps share; how much each takes is the kernel's own division. The parts are
described in schedule_model.py, which prints them.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmark.kernels.division import divider
from benchmark.kernels.gpu_case import DIM, KV_HEADS, Q_HEADS
from hma_kernels.cuda.decode import instance_for
from hma_kernels.layout import PAGE

GQA_GROUP_SIZE = Q_HEADS // KV_HEADS

# Of a load from memory, without a queue. Assumed: microbenchmarks of A100 and H100 report some 500
# clocks, 0.3 us, for neighbouring addresses (arXiv 2402.13499); here pages are anywhere.
LATENCY_S = 0.5e-6
RESERVED_BYTES = 1024  # of shared memory for each block (CUDA C++ Programming Guide, 9.0 and 8.0)

BFP8_TILE_BYTES = 2 * PAGE * DIM * 17 // 16  # a page's K and V of one head
BF16_TILE_BYTES = 2 * PAGE // 2 * DIM * 2  # half a page's


@dataclass(frozen=True)
class Card:
    """bandwidth: bytes/s, as quoted. stages: as hma_kernels/cuda/decode.py chooses them."""

    processors: int
    shared_bytes: int
    bandwidth: float
    stages: int
    source: str


CARDS = {
    "a100": Card(108, 164 << 10, 2.039e12, 2, "A100 SXM 80 GB: NVIDIA's datasheet and whitepaper"),
    "h100": Card(132, 228 << 10, 3.35e12, 3, "H100 SXM: NVIDIA's datasheet and whitepaper"),
    "h200": Card(132, 228 << 10, 4.8e12, 3, "H200 SXM: NVIDIA's datasheet; processors as H100"),
    "b200": Card(
        148,
        228 << 10,
        8.0e12,
        3,
        "B200: NVIDIA's datasheet of DGX B200 (64 TB/s of eight); processors and shared memory: "
        "chipsandcheese.com, Nvidia's B200",
    ),
}


def streaming_seconds(
    warps: Sequence[Sequence[float]], bandwidth: float, warp_bandwidth: float, pause: float
) -> float:
    """Until every warp has read its segments (bytes each) in turn, `pause` seconds between two.

    Warps that read share `bandwidth` equally; none has more than `warp_bandwidth`. Bytes/s.
    """
    left = [list(reversed(segments)) for segments in warps]
    now = given = 0.0  # given: bytes that a warp would have that had read all the time
    reading = [(segments.pop(), warp) for warp, segments in enumerate(left) if segments]
    pausing: list[tuple[float, int]] = []
    heapq.heapify(reading)
    while reading or pausing:
        rate = min(bandwidth / len(reading), warp_bandwidth) if reading else 0.0
        end = now + (reading[0][0] - given) / rate if reading else math.inf
        if pausing and pausing[0][0] <= end:
            resumed, warp = heapq.heappop(pausing)
            given += rate * (resumed - now)
            now = resumed
            heapq.heappush(reading, (given + left[warp].pop(), warp))
            continue
        now = end
        given, warp = heapq.heappop(reading)
        if left[warp]:
            heapq.heappush(pausing, (now + pause, warp))
    return now


@dataclass(frozen=True)
class Prediction:
    """Seconds of each part of a call; bytes of K and V; warps that have tiles; most of them."""

    bytes: int
    working_warps: int
    most_tiles: int
    floor: float
    streaming: float
    partial_states: float
    queue: float
    fixed: float

    @property
    def schedule_share(self) -> float:
        return self.floor / (self.streaming + self.partial_states)

    @property
    def call(self) -> float:
        return self.streaming + self.partial_states + self.queue + self.fixed

    @property
    def call_share(self) -> float:
        return self.floor / self.call


def predict(
    card: Card, lengths: Sequence[int], bandwidth: float, fixed: float, *, bf16_pages: bool = False
) -> Prediction:
    """bandwidth: of a device copy, bytes/s; fixed: seconds."""
    instance = instance_for(DIM, DIM, GQA_GROUP_SIZE, torch.bfloat16, stages=card.stages)
    shared = divider(instance).shared_bytes
    blocks = card.processors * (card.shared_bytes // (shared + RESERVED_BYTES))
    rows = divider(instance).divide(
        lengths,
        kv_heads=KV_HEADS,
        gqa_group_size=GQA_GROUP_SIZE,
        blocks=blocks,
        bf16_pages=bf16_pages,
    )
    tile = BF16_TILE_BYTES if bf16_pages else BFP8_TILE_BYTES
    warps = [rows["tiles"][rows["warp"] == warp] * tile for warp in np.unique(rows["warp"])]
    total = int(rows["tiles"].sum()) * tile
    a_state = GQA_GROUP_SIZE * (DIM + 2) * 4  # float32: sums of V, a maximum, a sum of weights
    return Prediction(
        bytes=total,
        working_warps=len(warps),
        most_tiles=int(max(warp.sum() for warp in warps)) // tile,
        floor=total / bandwidth,
        streaming=streaming_seconds(
            [warp.tolist() for warp in warps],
            *(bandwidth, card.stages * tile / LATENCY_S, LATENCY_S),
        ),
        partial_states=2 * int((rows["partial"] >= 0).sum()) * a_state / bandwidth,
        queue=min(len(warps) * card.stages * tile, total) / bandwidth,
        fixed=fixed,
    )
