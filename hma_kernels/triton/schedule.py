"""How a batch's pages are shared out among the GPU's multiprocessors, decided on the GPU.

Work is cut into items: stretches of one request's pages, all of a request's equally long. How many
there are is bounded by what the host knows, so nothing waits for the GPU, and a CUDA graph that was
captured with the bound serves every later page table in the same tensors.
"""

import torch
import triton
import triton.language as tl

from hma_kernels.paged import PageTable

ITEMS_A_SM = 4


@triton.jit
def _cut(
    start8,
    start16,
    item_start,
    item_request,
    batch,
    wanted,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request: where its items start, and which items are its own."""
    request = tl.program_id(0)
    each = tl.arange(0, BATCH)
    held = each < batch
    count = tl.load(start8 + each + 1, mask=held, other=0)
    count -= tl.load(start8 + each, mask=held, other=0)
    count += tl.load(start16 + each + 1, mask=held, other=0)
    count -= tl.load(start16 + each, mask=held, other=0)
    an_item = tl.maximum((tl.sum(count, 0) + wanted - 1) // wanted, 1)
    items = (count + an_item - 1) // an_item
    first = tl.sum(tl.where(each < request, items, 0), 0)
    end = first + tl.sum(tl.where(each == request, items, 0), 0)
    tl.store(item_start + request, first.to(tl.int32))
    for at in range(first, end, BLOCK):
        item = at + tl.arange(0, BLOCK)
        tl.store(item_request + item, request, mask=item < end)
    if request == batch - 1:
        tl.store(item_start + batch, end.to(tl.int32))
        for at in range(end, wanted + batch, BLOCK):
            item = at + tl.arange(0, BLOCK)
            tl.store(item_request + item, batch, mask=item < wanted + batch)


class Schedule:
    """item_start: int32 [B+1]. item_request: int32 [bound], B where there is no item."""

    def __init__(self, table: PageTable, kv_heads: int) -> None:
        device = table.seq_lens.device
        self._table = table
        self._wanted = max(1, ITEMS_A_SM * _multiprocessors(device) // kv_heads)
        self.bound = self._wanted + table.batch_size
        self.item_start = torch.zeros(table.batch_size + 1, dtype=torch.int32, device=device)
        self.item_request = torch.empty(self.bound, dtype=torch.int32, device=device)
        self.update()

    def update(self) -> None:
        """After the table's tensors have got other contents."""
        batch = self._table.batch_size
        if batch:
            _cut[(batch,)](
                *(self._table.bfp8_indptr, self._table.bf16_indptr),
                *(self.item_start, self.item_request, batch, self._wanted),
                BATCH=triton.next_power_of_2(batch),
                BLOCK=128,
            )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # under the interpreter: enough for several items a request
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
