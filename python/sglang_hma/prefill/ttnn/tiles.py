"""Bytes of ttnn's host tensors in tile layout, as torch tensors that share them."""

from typing import Any

import torch

from hma_kernels import PAGE, TILE, TILE_BYTES

FACE = 16  # a tile is 2 x 2 faces of 16 x 16 elements, each row by row


def _raw(tensor: Any, chip: int = 0) -> torch.Tensor:
    import ttnn

    shard = tensor.host_buffer().get_shard(ttnn.MeshCoordinate(0, chip))
    return torch.utils.dlpack.from_dlpack(shard).view(torch.uint8).flatten()


def tile_bytes(tensor: Any, shape: tuple[int, ...], chip: int = 0) -> torch.Tensor:
    """Of a chip's part, BFP8 [1, heads, tokens, dim], of a host tensor: [heads, tokens / 32,
    dim / 32, 1088]."""
    _, heads, tokens, dim = shape
    return _raw(tensor, chip).view(heads, tokens // PAGE, dim // TILE, TILE_BYTES)


def tile_rows(tensor: Any, width: int) -> torch.Tensor:
    """A host tensor in BF16 [1, 1, rows, width] as [rows, width]."""
    tiles = width // TILE
    values = _raw(tensor).view(torch.bfloat16).view(-1, tiles, 2, 2, FACE, FACE)
    return values.permute(0, 2, 4, 1, 3, 5).reshape(-1, width)
