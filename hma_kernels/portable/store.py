"""Writes generated rows into BF16 pages, in torch."""

import torch

from hma_kernels.layout import PAGE, bf16_index


def store_generated(
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> None:
    """As hma_kernels.triton.store.store_generated, for any strides."""
    page, row = bf16_index(slots.long() // PAGE), slots.long() % PAGE
    k_pages[page, :, row] = k.to(torch.bfloat16)
    v_pages[page, :, row] = v.to(torch.bfloat16)
