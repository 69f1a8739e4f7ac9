"""Attention and codec kernels over BFP8 and BF16 KV pages; knows nothing of SGLang."""

from hma_kernels.implementation import describe
from hma_kernels.layout import GROUP, PAGE, TILE, TILE_BYTES
from hma_kernels.ops import (
    DecodePlan,
    bfp8_pack,
    bfp8_round,
    bfp8_unpack,
    bfp8_write_rows,
    extend_attention,
)
from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.xxh3 import xxh3_64

__all__ = [
    "GROUP",
    "PAGE",
    "TILE",
    "TILE_BYTES",
    "DecodePlan",
    "PageTable",
    "PagedKV",
    "bfp8_pack",
    "bfp8_round",
    "bfp8_unpack",
    "bfp8_write_rows",
    "describe",
    "extend_attention",
    "xxh3_64",
]
