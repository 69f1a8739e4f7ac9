"""Writes generated rows into BF16 pages on a GPU: one kernel for K and V."""

import torch
import triton
import triton.language as tl

from hma_kernels.triton.layout import PAGE, bf16_index


@triton.jit
def _store(
    slots,
    k,
    v,
    k_pages,
    v_pages,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
):
    """One program a token and KV head."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    page = slot // PAGE
    row = (bf16_index(page) * HEADS + head) * PAGE + slot % PAGE
    column = tl.arange(0, DIM_PADDED)
    values = tl.load(k + token * k_stride + head * k_head_stride + column, mask=column < DIM)
    tl.store(k_pages + row * DIM + column, values, mask=column < DIM)
    column = tl.arange(0, V_PADDED)
    values = tl.load(v + token * v_stride + head * v_head_stride + column, mask=column < V_DIM)
    tl.store(v_pages + row * V_DIM + column, values, mask=column < V_DIM)


def store_generated(
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> None:
    """slots: [n], SGLang's: page id * 32 + row, no BF16 slot twice. k, v: [n, heads, dim], the last
    dimension contiguous. k_pages, v_pages: bfloat16 [pages, heads, 32, dim], contiguous."""
    k, v = k.to(torch.bfloat16), v.to(torch.bfloat16)
    count, heads, dim = k.shape
    v_dim = v.shape[2]
    if count:
        _store[(count, heads)](
            *(slots, k, v, k_pages, v_pages, *k.stride()[:2], *v.stride()[:2]),
            HEADS=heads,
            DIM=dim,
            V_DIM=v_dim,
            DIM_PADDED=triton.next_power_of_2(dim),
            V_PADDED=triton.next_power_of_2(v_dim),
        )
