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
from sglang_hma.prefill.ttnn.offline import split
from sglang_hma.prefill.ttnn.shape import bucket, page_bucket, pages_of
from sglang_hma.prefill.ttnn.tiles import tile_bytes, tile_rows
from test.device.mock_widths import chunks_taken
from test.prefill.models import on_card, random_model

PAGES = 200

# A card without silicon has no queue to wait on; everything else is called as on a card.
ttnn.wait_for_event = lambda queue, event: None


def same_bytes(rng: np.random.Generator) -> bool:
    """Whether ttnn packs a weight as hma_kernels does, and its tiles are read as it wrote them."""
    weight = torch.from_numpy(rng.standard_normal((96, 160), np.float32)).bfloat16()
    host = ttnn.from_torch(weight[None, None], dtype=ttnn.bfloat8_b, layout=ttnn.TILE_LAYOUT)
    packed = bfp8_pack(weight, rounding="host")
    plain = ttnn.from_torch(weight[None, None], dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT)
    return torch.equal(tile_bytes(host, (1, 1, 96, 160))[0], packed) and torch.equal(
        tile_rows(plain, 160, 1, 3), weight[32:]
    )


def session(kind: str, head_dim: int, chips: int, seed: int) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    hf = random_model(kind, head_dim=head_dim, kv_heads=4)
    with opened(range(chips), chips) as card:
        before = card.dram.free
        runtime = on_card(card, hf, pages=PAGES)
        taken = before - card.dram.free
        part = runtime.shape.split(chips)
        predicted = part.weight_bytes(WeightFormats())
        predicted += PAGES * part.page_bytes * part.layers

        seen: set[tuple[int, int, int]] = set()
        needless = []
        for length in [1, 31, 32, 33, 64, 100, *rng.integers(1, 200, 6).tolist()]:
            cut = int(rng.integers(0, length)) // 32 * 32
            for chunk in split(np.zeros(length, np.int64), [cut] if cut else [], np.arange(1, 9)):
                tokens = len(chunk.tokens)
                padded = bucket(tokens)
                step = 128
                while chunk.start % step or padded % step:
                    step //= 2
                shape = (padded, page_bucket(chunk.start // 32 + pages_of(padded)), step)
                programs = card.programs
                for last, rows in ((False, tokens), (True, 1)):
                    logits = runtime.prefill([chunk], last=last)
                    assert logits[0].shape == (rows, 512)
                if shape in seen and card.programs > programs:
                    needless.append((tokens, chunk.start))
                seen.add(shape)
        return {
            "arch": card.arch,
            "chips": card.chips,
            "taken": taken,
            "predicted": predicted,
            "programs": card.programs,
            "needless": needless,
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
