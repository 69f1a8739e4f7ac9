"""The page table of a batch, made from SGLang's req_to_token and the formats of the slabs."""

import torch

from hma_kernels.layout import IDS_PER_SLAB, PAGE, bf16_index
from hma_kernels.paged import PageTable


def page_table(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    slab_is_bf16: torch.Tensor | None,
    slot_there: torch.Tensor | None = None,
) -> PageTable:
    """The table of the first seq_lens[b] tokens of each request.

    req_to_token: int32 [requests, tokens], slots. rows: [B], row of req_to_token of each request.
    seq_lens: [B]. slab_is_bf16: bool [slabs]; None where every page is BFP8. slot_there: int64, of
    each slot the one in the pool whose pages are meant, 0 where it has none any more: page 0 stands
    for pages that no query sees. The sizes of the result depend on the data, so this waits for a
    GPU.
    """
    seq_lens = seq_lens.to(torch.int64)
    counts = (seq_lens + PAGE - 1) // PAGE
    request = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    start = (counts.cumsum(0) - counts)[request]
    pos = (torch.arange(len(request), device=counts.device) - start) * PAGE
    slots = req_to_token[rows[request], pos].long()
    pages = (slots if slot_there is None else slot_there[slots]) // PAGE
    if slab_is_bf16 is None:
        in_bf16 = torch.zeros_like(pages, dtype=torch.bool)
    else:
        in_bf16 = slab_is_bf16[pages // IDS_PER_SLAB]

    def indptr(chosen: torch.Tensor) -> torch.Tensor:
        per_request = torch.bincount(request[chosen], minlength=len(counts))
        return torch.cat([per_request.new_zeros(1), per_request.cumsum(0)])

    return PageTable(
        bfp8_indptr=indptr(~in_bf16),
        bfp8_indices=pages[~in_bf16],
        bfp8_pos=pos[~in_bf16],
        bf16_indptr=indptr(in_bf16),
        bf16_indices=bf16_index(pages[in_bf16]),
        bf16_pos=pos[in_bf16],
        seq_lens=seq_lens,
    )
