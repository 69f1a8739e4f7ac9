"""Codec and checksum kernels on a GPU: bytes read and written over those of a device copy."""

from collections.abc import Callable

import torch

from benchmark.common import Figure, finish, interleave, parser, table
from benchmark.kernels.gpu_case import DEVICE, captured, copied
from hma_kernels import TILE_BYTES, bfp8_pack, bfp8_unpack
from hma_kernels.triton import xxh3

ROWS, COLUMNS = 1 << 19, 1024
PAGE_BYTES = 34816  # 8 KV heads, head_dim 128


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("memory_gpu needs a GPU; torch sees none")
    x = torch.randn((ROWS, COLUMNS), dtype=torch.bfloat16, device=DEVICE)
    tiles = bfp8_pack(x)
    back = torch.empty_like(x)
    pages = tiles.numel() // PAGE_BYTES
    addresses = torch.arange(pages, device=DEVICE) * PAGE_BYTES + tiles.data_ptr()
    words = torch.empty((pages, 8), dtype=torch.uint64, device=DEVICE)
    both = x.nbytes + tiles.nbytes
    work: dict[str, tuple[Callable[[int], object], int]] = {
        "pack": (lambda _: bfp8_pack(x, out=tiles), both),
        "unpack": (lambda _: bfp8_unpack(tiles, out=back), both),
        "checksum": (lambda _: xxh3.enqueue(addresses, PAGE_BYTES, words), pages * PAGE_BYTES),
    }
    graphs = {name: captured(run, 1) for name, (run, _) in work.items()}
    times = interleave({"copy": copied(), **graphs}, args.rounds)
    rate = {name: size / times[name].median for name, (_, size) in work.items()}
    rate["copy"] = 1 / times["copy"].median
    table(
        f"{x.nbytes >> 20} MiB of BF16, tiles of {TILE_BYTES} bytes",
        ["operation", "ms", "GB/s", "of copy"],
        [
            [
                *(
                    name,
                    f"{times[name].median * 1e3:.3f}" if name in work else "-",
                    f"{value / 1e9:.0f}",
                ),
                f"{value / rate['copy']:.0%}",
            ]
            for name, value in rate.items()
        ],
    )
    figures = [Figure(f"{n}, of a copy's bandwidth", rate[n] / rate["copy"], 0.5) for n in work]
    finish(args, {"gpu": torch.cuda.get_device_name(), "bytes_per_s": rate}, figures)


if __name__ == "__main__":
    main()
