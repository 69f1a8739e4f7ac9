"""Tensors to the extension's codec; arguments are those of hma_kernels.ops, checked there."""

from typing import TypeAlias

import torch

from hma_kernels.cpu import _ext
from hma_kernels.layout import Rounding

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Matrix: TypeAlias = tuple[int, int, int, int, int, int, int]


def matrix(x: torch.Tensor) -> tuple[Matrix, torch.Tensor]:
    """x [..., H, W] as the extension reads it, and the tensor that must outlive the call."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    flat = x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])
    outer, height, width = flat.shape
    shape = outer, height, width, flat.stride(0), flat.stride(1)
    return (flat.data_ptr(), TYPES[flat.dtype], *shape), flat


def pack(x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None:
    source, _keep = matrix(x)
    _ext.pack(source, rounding == "host", out.data_ptr())


def unpack(tiles: torch.Tensor, out: torch.Tensor) -> None:
    tiles = tiles.contiguous()
    if out.dtype == torch.float64:
        narrow = torch.empty(out.shape, dtype=torch.float32)
        unpack(tiles, narrow)
        out.copy_(narrow)
        return
    target, _keep = matrix(out)
    _ext.unpack(tiles.data_ptr(), target)


def round_values(x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None:
    source, _keep = matrix(x.reshape(1, -1, x.shape[-1]))
    _ext.round(source, rounding == "host", out.data_ptr())


def write_rows(
    pages: torch.Tensor, page_ids: torch.Tensor, rows: torch.Tensor, x: torch.Tensor
) -> None:
    if x.stride(-1) != 1:
        x = x.contiguous()
    if not pages[0].is_contiguous():
        raise ValueError(f"bfp8_write_rows: page strides {pages.stride()[1:]} leave gaps")
    _ext.write_rows(
        x.data_ptr(),
        TYPES[x.dtype],
        (*x.shape, x.stride(0), x.stride(1)),
        pages.data_ptr(),
        pages.stride(0),
        len(pages),
        page_ids.numpy(),
        rows.numpy(),
    )
