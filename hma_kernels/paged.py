"""The paged KV cache as kernels see it: page memory of both formats, and who attends to what."""

from dataclasses import dataclass
from typing import Self

import torch

from hma_kernels.layout import PAGE, TILE, TILE_BYTES


@dataclass(frozen=True)
class PagedKV:
    """Views of one arena; a page holds 32 tokens of one layer's K or V, head-major.

    k_bfp8: per layer uint8 [pages, kv_heads, head_dim/32, 1088]; v_bfp8 likewise (v_head_dim).
    k_bf16: per layer bfloat16 [bf16_pages, kv_heads, 32, head_dim]; v_bf16 likewise (v_head_dim).
    Both formats cover the same memory, so their page counts differ. A page is contiguous.

    Raises ValueError if a shape, dtype or stride differs from the above or between layers.
    """

    k_bfp8: list[torch.Tensor]
    v_bfp8: list[torch.Tensor]
    k_bf16: list[torch.Tensor]
    v_bf16: list[torch.Tensor]

    def __post_init__(self) -> None:
        layers = len(self.k_bf16)
        if layers == 0:
            raise ValueError("PagedKV.k_bf16 has 0 layers; at least 1 is needed")
        for name, bf16, bfp8 in (
            ("k", self.k_bf16, self.k_bfp8),
            ("v", self.v_bf16, self.v_bfp8),
        ):
            if len(bf16) != layers or len(bfp8) != layers:
                raise ValueError(
                    f"PagedKV.{name}_bf16 and {name}_bfp8 have {len(bf16)} and {len(bfp8)} "
                    f"layers; both need {layers}"
                )
            dim = bf16[0].shape[-1]
            if dim % TILE:
                raise ValueError(f"PagedKV.{name}_bf16 head dim {dim} is no multiple of {TILE}")
            for pages in bf16:
                _check(f"{name}_bf16", pages, torch.bfloat16, (self.kv_heads, PAGE, dim))
            for pages in bfp8:
                tiles = (self.kv_heads, dim // TILE, TILE_BYTES)
                _check(f"{name}_bfp8", pages, torch.uint8, tiles)

    @property
    def device(self) -> torch.device:
        return self.k_bf16[0].device

    @property
    def kv_heads(self) -> int:
        return self.k_bf16[0].shape[1]

    @property
    def head_dim(self) -> int:
        return self.k_bf16[0].shape[-1]

    @property
    def v_head_dim(self) -> int:
        return self.v_bf16[0].shape[-1]


def _check(name: str, pages: torch.Tensor, dtype: torch.dtype, page_shape: tuple[int, ...]) -> None:
    if pages.dtype != dtype or tuple(pages.shape[1:]) != page_shape:
        raise ValueError(
            f"PagedKV.{name} is {pages.dtype} {list(pages.shape)}; "
            f"needs {dtype} [pages, {', '.join(map(str, page_shape))}]"
        )
    if len(pages) and not pages[0].is_contiguous():
        raise ValueError(f"PagedKV.{name} has strides {pages.stride()}; a page must be contiguous")


@dataclass(frozen=True)
class PageTable:
    """The pages of B requests, one CSR list per format; all int64, on one device.

    *_indptr: [B+1], request b owns entries indptr[b]..indptr[b+1]-1 of indices and pos.
    *_indices: page ids. *_pos: position of each page's first token. seq_lens: [B], tokens to attend
    to. Entries of indices and pos from indptr[B] on do not count.
    A page holds positions pos..pos+31. Its rows from position seq_len on are undefined and must not
    reach a result. A request's pages do not overlap; their order does not matter.

    Raises ValueError for a wrong dtype or shape and, for host tensors, an inconsistent indptr.
    """

    bfp8_indptr: torch.Tensor
    bfp8_indices: torch.Tensor
    bfp8_pos: torch.Tensor
    bf16_indptr: torch.Tensor
    bf16_indices: torch.Tensor
    bf16_pos: torch.Tensor
    seq_lens: torch.Tensor

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value.dtype != torch.int64 or value.dim() != 1:
                raise ValueError(
                    f"PageTable.{name} is {value.dtype} {list(value.shape)}; needs int64 [n]"
                )
        for name, indptr, indices, pos in (
            ("bfp8", self.bfp8_indptr, self.bfp8_indices, self.bfp8_pos),
            ("bf16", self.bf16_indptr, self.bf16_indices, self.bf16_pos),
        ):
            if len(indptr) != self.batch_size + 1:
                raise ValueError(
                    f"PageTable.{name}_indptr has {len(indptr)} entries; "
                    f"needs {self.batch_size + 1} for {self.batch_size} seq_lens"
                )
            if len(indices) != len(pos):
                raise ValueError(
                    f"PageTable.{name}_indices has {len(indices)} entries and {name}_pos "
                    f"{len(pos)}; they must match"
                )
            if indptr.device.type == "cpu" and not _is_indptr(indptr, len(indices)):
                raise ValueError(
                    f"PageTable.{name}_indptr must rise from 0 to at most {len(indices)}; "
                    f"got {indptr.tolist()}"
                )

    @property
    def batch_size(self) -> int:
        return len(self.seq_lens)

    def of_rows(self, q_indptr: torch.Tensor) -> Self:
        """Each query as a request of its own: row i of request b's n rows has its pages, and
        seq_lens[b] - n + 1 + i tokens. q_indptr: int64 [B+1] on the host. A copy."""
        device, counts = self.seq_lens.device, q_indptr.diff()
        rows = int(q_indptr[-1])
        request = torch.repeat_interleave(torch.arange(self.batch_size), counts)
        later = q_indptr[1:][request] - 1 - torch.arange(rows)
        request, later = request.to(device), later.to(device)
        fields = {"seq_lens": (self.seq_lens[request] - later).clamp(min=0)}
        for name in ("bfp8", "bf16"):
            indptr = getattr(self, f"{name}_indptr")
            sizes = indptr.diff()[request]
            ends = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
            shift = torch.repeat_interleave(indptr[:-1][request] - ends[:-1], sizes)
            entry = torch.arange(len(shift), device=device) + shift
            fields[f"{name}_indptr"] = ends
            fields[f"{name}_indices"] = getattr(self, f"{name}_indices")[entry]
            fields[f"{name}_pos"] = getattr(self, f"{name}_pos")[entry]
        return type(self)(**fields)

    def to(self, device: torch.device) -> Self:
        """The table on another device; itself if it is there."""
        if self.seq_lens.device == device:
            return self
        return type(self)(**{name: value.to(device) for name, value in vars(self).items()})


def _is_indptr(indptr: torch.Tensor, entries: int) -> bool:
    ends = int(indptr[0]) == 0 and int(indptr[-1]) <= entries
    return ends and not bool((indptr.diff() < 0).any())
