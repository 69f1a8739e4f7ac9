"""Decode attention in torch over BFP8 and BF16 pages: planned once a step, run once a layer.

Each page gives a partial softmax state (maximum, sum of weights, weighted sum of V). The states of
a request's pages merge exactly, so pages of any requests may share a batched product.
"""

from dataclasses import dataclass

import torch

from hma_kernels.base import DecodeCall
from hma_kernels.layout import PAGE
from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.portable.codec import unpack_strips

# K and V elements unpacked at once: 4 MB as float32, so that a chunk stays in cache.
_CHUNK_ELEMENTS = 1 << 20


def compute_dtype(q: torch.Tensor) -> torch.dtype:
    """float64 for float32 queries, else float32."""
    return torch.float64 if q.dtype == torch.float32 else torch.float32


def load_pages(pages: torch.Tensor, page_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pages of either format, uint8 [P, H, D/32, 1088] or bfloat16 [P, H, 32, D] -> [n, H, 32, D].

    Exact in dtype. page_ids: int64 [n].
    """
    picked = pages.index_select(0, page_ids)
    if picked.dtype != torch.uint8:
        return picked.to(dtype)
    rows = unpack_strips(picked.flatten(0, 1), dtype)
    return rows.view(*picked.shape[:2], *rows.shape[1:])


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(logits / cap), in place; no change when cap is 0."""
    return logits.div_(cap).tanh_().mul_(cap) if cap > 0 else logits


@dataclass(frozen=True)
class _Chunk:
    is_bfp8: bool
    indices: torch.Tensor  # [n]
    request: torch.Tensor  # [n]
    hidden_page: torch.Tensor  # [m], of 0..n-1, and the row of each token outside begin..end-1
    hidden_row: torch.Tensor  # [m]


class DecodePlan:
    """hma_kernels.DecodePlan; what no layer changes is computed once."""

    def __init__(
        self,
        kv: PagedKV,
        table: PageTable,
        heads: int,
        sliding_window: int,
        q_indptr: torch.Tensor | None = None,
    ) -> None:
        self._kv = kv
        self._given = table
        self._q_indptr = q_indptr
        self._heads = heads
        self._sliding_window = sliding_window
        self.refresh()

    def refresh(self) -> None:
        kv, device = self._kv, self._kv.device
        table = self._given if self._q_indptr is None else self._given.of_rows(self._q_indptr)
        self._table = table
        end = table.seq_lens.to(device)
        window = self._sliding_window
        begin = (end - 1 - window if window >= 0 else end * 0).clamp(min=0)
        page_elements = PAGE * kv.kv_heads * (kv.head_dim + kv.v_head_dim)
        per_chunk = max(1, _CHUNK_ELEMENTS // page_elements)
        self._chunks = [
            chunk
            for is_bfp8, indptr, indices, pos in (
                (True, table.bfp8_indptr, table.bfp8_indices, table.bfp8_pos),
                (False, table.bf16_indptr, table.bf16_indices, table.bf16_pos),
            )
            for chunk in _chunks(
                is_bfp8,
                indptr.to(device),
                indices.to(device),
                pos.to(device),
                begin,
                end,
                per_chunk,
            )
        ]

    def run(self, call: DecodeCall) -> None:
        kv, batch, heads, q = self._kv, self._table.batch_size, self._heads, call.q
        gqa_group_size = heads // kv.kv_heads
        dtype = compute_dtype(q)
        query = (q.to(dtype) * call.scale).reshape(batch, kv.kv_heads, gqa_group_size, kv.head_dim)
        query = query.transpose(2, 3).contiguous()

        state = _State(batch, heads, kv.v_head_dim, dtype, q.device)
        for chunk in self._chunks:
            k_pages, v_pages = (kv.k_bfp8, kv.v_bfp8) if chunk.is_bfp8 else (kv.k_bf16, kv.v_bf16)
            k = load_pages(k_pages[call.layer], chunk.indices, dtype)
            own_query = query.index_select(0, chunk.request)
            logits = torch.bmm(k.flatten(0, 1), own_query.flatten(0, 1)).transpose(1, 2)
            logits = soft_cap(logits.contiguous(), call.logit_cap).view(-1, heads, PAGE)
            v = load_pages(v_pages[call.layer], chunk.indices, dtype)
            # Hidden rows may hold anything, even NaN, so they are replaced, not multiplied by zero.
            logits[chunk.hidden_page, :, chunk.hidden_row] = -torch.inf
            v[chunk.hidden_page, :, chunk.hidden_row] = 0
            state.add(logits, v, chunk.request)
        call.out.copy_(state.result(call.sinks))


def _chunks(
    is_bfp8: bool,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    pos: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    per_chunk: int,
) -> list[_Chunk]:
    """Pages with a visible row (begin <= position < end, per request), cut into chunks."""
    entries = int(indptr[-1])
    indices, pos = indices[:entries], pos[:entries]
    requests = torch.arange(len(end), device=indptr.device)
    request = torch.repeat_interleave(requests, indptr.diff(), output_size=entries)
    position = pos[:, None] + torch.arange(PAGE, device=pos.device)
    visible = (position >= begin[request, None]) & (position < end[request, None])
    used = visible.any(-1).nonzero().view(-1)
    chunks = []
    for first in range(0, len(used), per_chunk):
        picked = used[first : first + per_chunk]
        page, row = (~visible[picked]).nonzero(as_tuple=True)
        chunks.append(_Chunk(is_bfp8, indices[picked], request[picked], page, row))
    return chunks


class _State:
    """Softmax state per request and query head: maximum, sum of weights, weighted sum of V."""

    def __init__(
        self, batch: int, heads: int, v_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._max = torch.full((batch, heads), -torch.inf, dtype=dtype, device=device)
        self._sum = torch.zeros((batch, heads), dtype=dtype, device=device)
        self._out = torch.zeros((batch, heads, v_dim), dtype=dtype, device=device)

    def add(self, logits: torch.Tensor, v: torch.Tensor, request: torch.Tensor) -> None:
        """Merges pages: logits [n, Hq, 32], overwritten, v [n, H, 32, Dv], request [n]."""
        pages, heads, _ = logits.shape
        slot = request[:, None].expand(-1, heads)
        new_max = self._max.scatter_reduce(0, slot, logits.amax(-1), "amax")
        # Before its first page a request's maximum is -inf; -inf - -inf must not become NaN.
        decay = torch.exp(self._max - new_max).masked_fill_(self._max == -torch.inf, 0)
        weights = logits.sub_(new_max.index_select(0, request)[..., None]).exp_()
        per_kv_head = weights.view(pages * v.shape[1], -1, PAGE)
        partial = torch.bmm(per_kv_head, v.flatten(0, 1)).view(pages, heads, -1)
        self._sum.mul_(decay).index_add_(0, request, weights.sum(-1))
        self._out.mul_(decay[..., None]).index_add_(0, request, partial)
        self._max = new_max

    def result(self, sinks: torch.Tensor | None) -> torch.Tensor:
        total = self._sum
        if sinks is not None:
            # Where nothing is visible the maximum is -inf; -inf - -inf must not become NaN.
            total = total + torch.exp(sinks.to(total) - self._max).nan_to_num_(0, posinf=torch.inf)
        return self._out / total.masked_fill(total == 0, 1)[..., None]
