"""Runs the Tenstorrent runtime on described cards; prints a line of JSON for each run.

mock_session CHIPS SEED KIND:HEAD_DIM ... widths:HIDDEN,HEADS,KV_HEADS,INTERMEDIATE ...
"""

import json
import sys

import numpy as np
import torch
import ttnn

from hma_kernels import bfp8_pack
from sglang_hma.config import WeightFormats
from sglang_hma.prefill.ttnn.card import opened
from sglang_hma.prefill.ttnn.chunk import Chunk
from sglang_hma.prefill.ttnn.lane import input_bytes
from sglang_hma.prefill.ttnn.shape import BF16
from sglang_hma.prefill.ttnn.tiles import tile_bytes, tile_rows
from test.device.mock_widths import chunks_taken
from test.prefill.models import on_card, random_model

PAGES, CHUNK = 200, 512

# A card without silicon has no queue to wait on; everything else is called as on a card.
ttnn.wait_for_event = lambda queue, event: None


def same_bytes(rng: np.random.Generator) -> bool:
    """Whether ttnn packs a weight as hma_kernels does, and its tiles are read as it wrote them."""
    weight = torch.from_numpy(rng.standard_normal((96, 160), np.float32)).bfloat16()
    host = ttnn.from_torch(weight[None, None], dtype=ttnn.bfloat8_b, layout=ttnn.TILE_LAYOUT)
    packed = bfp8_pack(weight, rounding="host")
    plain = ttnn.from_torch(weight[None, None], dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT)
    return torch.equal(tile_bytes(host, (1, 1, 96, 160))[0], packed) and torch.equal(
        tile_rows(plain, 160), weight
    )


def session(kind: str, head_dim: int, chips: int, seed: int) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    hf = random_model(kind, head_dim=head_dim, kv_heads=4)
    with opened(range(chips), chips) as card:
        before = card.dram.free
        runtime = on_card(card, hf, pages=PAGES, chunk_tokens=CHUNK)
        taken = before - card.dram.free
        part = runtime.shape.split(chips)
        predicted = part.weight_bytes(WeightFormats())
        predicted += PAGES * part.page_bytes * part.layers
        predicted += 2 * runtime.model.context * part.head_dim * BF16  # rotary tables
        for bucket in runtime.runner.buckets:
            predicted += input_bytes(bucket, runtime.runner.width)

        runtime.runner.warm_up(traces=False)
        programs = card.programs
        for _ in range(8):
            chunks = []
            for number in range(int(rng.integers(1, 9))):
                start, length = int(rng.integers(0, 4)) * 32, int(rng.integers(1, 70))
                pages = np.arange(1, 7) + 6 * number
                chunks.append(Chunk(np.zeros(length, np.int64), start, pages))
            for last in (False, True):
                logits = runtime.prefill(chunks, last=last)
                rows = [1 if last else len(chunk.tokens) for chunk in chunks]
                assert [tuple(one.shape) for one in logits] == [(n, 512) for n in rows]
        return {
            "arch": card.arch,
            "chips": card.chips,
            "taken": taken,
            "predicted": predicted,
            "programs": programs,
            "programs_after_start": runtime.runner.facts()["programs_after_start"],
            "buckets": len(runtime.runner.lanes),
            "layers": runtime.stored[:2],
            "same_bytes": same_bytes(rng),
        }


def main(chips: int, seed: int, *runs: str) -> None:
    for run in runs:
        kind, sizes = run.split(":")
        numbers = map(int, sizes.split(","))
        if kind == "widths":
            print(json.dumps(chunks_taken(chips, *numbers)))
        else:
            print(json.dumps(session(kind, *numbers, chips, seed)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
