"""A landed BFP8 page becomes a BF16 page in every layer, in one kernel for K and one for V."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hma_kernels import layout
from hma_kernels.triton.layout import PAGE
from hma_kernels.triton.pages import load_bfp8


@triton.jit
def _unpack_page(
    packed,
    plain,
    source_offset,
    target_offset,
    STRIP_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """One program a layer and KV head. packed, plain: addresses of page 0 of each layer."""
    layer, head = tl.program_id(0), tl.program_id(1)
    tiles = tl.load(packed + layer).to(tl.pointer_type(tl.uint8)) + source_offset
    out = tl.load(plain + layer).to(tl.pointer_type(tl.bfloat16)) + target_offset
    row = tl.arange(0, PAGE)
    strip = tl.zeros([PAGE], tl.int64) + head * STRIP_BYTES
    values = load_bfp8(tiles, strip, row, row < PAGE, DIM, DIM_PADDED)
    column = tl.arange(0, DIM_PADDED)
    # The upper half of the bits; a conversion would not keep those of a NaN.
    upper = (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(
        out + ((head * PAGE + row) * DIM)[:, None] + column[None, :],
        upper,
        mask=(row < PAGE)[:, None] & (column < DIM)[None, :],
    )


class PageUnpacker:
    """Of the pages of all layers of one kind, K or V.

    packed: a layer's BFP8 pages, uint8 [pages, heads, dim/32, 1088], contiguous; plain: its BF16
    pages, bfloat16 [pages, heads, 32, dim], contiguous. Both stay where they are.
    """

    def __init__(self, packed: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> None:
        device = packed[0].device
        self._heads, self._dim = plain[0].shape[1], plain[0].shape[3]
        self._page_bytes, self._page_elements = packed[0].stride(0), plain[0].stride(0)
        self._packed, self._plain = (
            torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64, device=device)
            for layers in (packed, plain)
        )

    def unpack(self, source: int, target: int) -> None:
        """BFP8 page `source` into page `target` of the BF16 pages. Only enqueues."""
        _unpack_page[(len(self._packed), self._heads)](
            *(self._packed, self._plain),
            *(source * self._page_bytes, target * self._page_elements),
            STRIP_BYTES=self._dim // layout.TILE * layout.TILE_BYTES,
            DIM=self._dim,
            DIM_PADDED=triton.next_power_of_2(self._dim),
        )
