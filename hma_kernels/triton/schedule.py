"""How a batch's pages are divided among the GPU's streaming multiprocessors, decided on the GPU.

A work item is a range of one request's pages; all items of a request are equally long. The number
of items is bounded by what the host knows. So nothing waits for the GPU, and a CUDA graph that was
captured with the bound serves every later page table in the same tensors.
"""

import torch
import triton
import triton.language as tl

from hma_kernels.paged import PageTable

ITEMS_PER_SM = 16  # work items per streaming multiprocessor, those of each KV head counted
BLOCK = 128


@triton.jit
def _divide(
    bfp8_indptr,
    bf16_indptr,
    item_indptr,
    item_request,
    batch_size,
    target_items,
    BATCH_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request: where its items start, and which items are its own."""
    request = tl.program_id(0)
    each = tl.arange(0, BATCH_PADDED)
    valid = each < batch_size
    pages = tl.load(bfp8_indptr + each + 1, mask=valid, other=0)
    pages -= tl.load(bfp8_indptr + each, mask=valid, other=0)
    pages += tl.load(bf16_indptr + each + 1, mask=valid, other=0)
    pages -= tl.load(bf16_indptr + each, mask=valid, other=0)
    pages_per_item = tl.maximum((tl.sum(pages, 0) + target_items - 1) // target_items, 1)
    items = (pages + pages_per_item - 1) // pages_per_item
    first = tl.sum(tl.where(each < request, items, 0), 0)
    end = first + tl.sum(tl.where(each == request, items, 0), 0)
    tl.store(item_indptr + request, first.to(tl.int32))
    for start in range(first, end, BLOCK):
        item = start + tl.arange(0, BLOCK)
        tl.store(item_request + item, request, mask=item < end)
    if request == batch_size - 1:
        tl.store(item_indptr + batch_size, end.to(tl.int32))
        max_items = target_items + batch_size
        for start in range(end, max_items, BLOCK):
            item = start + tl.arange(0, BLOCK)
            tl.store(item_request + item, batch_size, mask=item < max_items)


class Schedule:
    """Request b has work items item_indptr[b]..item_indptr[b+1]-1.

    item_indptr: int32 [B+1]. item_request: int32 [max_items], the request of each item, B where
    there is no item.
    """

    def __init__(self, table: PageTable, kv_heads: int) -> None:
        device = table.seq_lens.device
        self._table = table
        self._target_items = max(1, ITEMS_PER_SM * _multiprocessors(device) // kv_heads)
        # Each request may round its number of items up once.
        self.max_items = self._target_items + table.batch_size
        self.item_indptr = torch.zeros(table.batch_size + 1, dtype=torch.int32, device=device)
        self.item_request = torch.empty(self.max_items, dtype=torch.int32, device=device)
        self.update()

    def update(self) -> None:
        """Divides anew after the contents of the table's tensors have changed."""
        batch_size = self._table.batch_size
        if batch_size:
            _divide[(batch_size,)](
                *(self._table.bfp8_indptr, self._table.bf16_indptr),
                *(self.item_indptr, self.item_request, batch_size, self._target_items),
                BATCH_PADDED=triton.next_power_of_2(batch_size),
                BLOCK=BLOCK,
            )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # under the interpreter: several items a request, and several pages an item
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
