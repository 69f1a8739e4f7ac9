"""A small problem that a kernel must solve on a GPU before it is used there."""

from collections.abc import Callable

import torch

from hma_kernels import portable
from hma_kernels.base import DecodeCall, Plan
from hma_kernels.layout import EXPONENT_BYTES, PAGE, TILE, TILE_BYTES
from hma_kernels.paged import PagedKV, PageTable

TOLERANCE = 2e-2  # of the largest value; a wrong fragment or exponent is off by far more


def check(
    plan: Callable[[PagedKV, PageTable, int], Plan],
    head_dim: int,
    v_head_dim: int,
    gqa_group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Three requests over both formats with a part-full page, whose unused rows are NaN.

    Raises RuntimeError if the plan's answer differs from torch's in float64.
    """
    generator = torch.Generator().manual_seed(1)
    kv_heads, pages = 2, 6

    def bfp8(dim: int) -> torch.Tensor:
        tiles = torch.randint(
            256, (pages, kv_heads, dim // TILE, TILE_BYTES), generator=generator, dtype=torch.uint8
        )
        tiles[..., :EXPONENT_BYTES] = 120 + tiles[..., :EXPONENT_BYTES] % 8
        return tiles

    def bf16(dim: int) -> torch.Tensor:
        x = torch.randn((pages, kv_heads, PAGE, dim), generator=generator).bfloat16()
        x[-1, :, 1:] = torch.nan
        return x

    host = PagedKV([bfp8(head_dim)], [bfp8(v_head_dim)], [bf16(head_dim)], [bf16(v_head_dim)])
    table = PageTable(
        bfp8_indptr=torch.tensor([0, 4, 5, 5]),
        bfp8_indices=torch.tensor([3, 0, 5, 1, 2]),
        bfp8_pos=torch.tensor([0, 32, 64, 96, 0]),
        bf16_indptr=torch.tensor([0, 2, 2, 3]),
        bf16_indices=torch.tensor([4, 5, 0]),
        bf16_pos=torch.tensor([128, 160, 0]),
        seq_lens=torch.tensor([161, 17, 32]),
    )
    heads = kv_heads * gqa_group_size
    q = torch.randn((3, heads, head_dim), generator=generator).to(dtype)
    scale = head_dim**-0.5
    expected = torch.empty((3, heads, v_head_dim))
    portable.decode_plan(host, table, heads, -1).run(DecodeCall(q.float(), 0, scale, 0.0, expected))

    kv = PagedKV(*([layer.to(device) for layer in layers] for layers in vars(host).values()))
    out = torch.full((3, heads, v_head_dim), torch.nan, dtype=dtype, device=device)
    plan(kv, table.to(device), heads).run(DecodeCall(q.to(device), 0, scale, 0.0, out))
    error = ((out.float().cpu() - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:
        raise RuntimeError(f"the answer to a probe is off by {error:.2g} of the largest value")
