"""ttnn's host packer and unpacker, timed on request: `ttnn_peer.py ELEMENTS`, commands on stdin.

Runs in a virtual environment with ttnn and needs no card: a cluster
descriptor of one Blackhole card stands in for it. Pinned to one core.
"""

import os
import sys
import time
from pathlib import Path

CARD = Path(__file__).parent / "blackhole_card.yaml"
WIDTH = 4096


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["TT_METAL_MOCK_CLUSTER_DESC_PATH"] = str(CARD)
    serve(int(sys.argv[1]))


def serve(elements: int) -> None:
    import numpy as np
    import ttnn  # type: ignore[import-not-found]

    x = np.random.default_rng().standard_normal((1, 1, elements // WIDTH, WIDTH), np.float32)

    def tensor(dtype):  # type: ignore[no-untyped-def]
        return ttnn.Tensor(x, data_type=dtype, layout=ttnn.TILE_LAYOUT)

    plain, packed = tensor(ttnn.float32), tensor(ttnn.bfloat8_b)
    run = {
        # Both start from tiles: the conversion alone, without ttnn's change of layout.
        "pack": lambda: ttnn.to_dtype(plain, ttnn.bfloat8_b),
        "unpack bf16": lambda: ttnn.to_dtype(packed, ttnn.bfloat16),
        "unpack f32": lambda: ttnn.to_dtype(packed, ttnn.float32),
    }
    for line in sys.stdin:
        start = time.perf_counter()
        run[line.strip()]()
        print("seconds", time.perf_counter() - start, flush=True)


main()
