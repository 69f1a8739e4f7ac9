"""Prefill attention in torch: new rows over a cached prefix and causally over themselves."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from hma_kernels.base import ExtendCall
from hma_kernels.layout import PAGE
from hma_kernels.portable.attention import compute_dtype, load_pages, soft_cap

# Logits held at once; the queries of a longer prompt are taken in blocks.
_BLOCK_LOGITS = 1 << 23


def extend(call: ExtendCall) -> None:
    q, k, v, out = call.q, call.k, call.v, call.out
    scale, logit_cap, sliding_window = call.scale, call.logit_cap, call.sliding_window
    use_sdpa = q.dtype == torch.bfloat16 and logit_cap == 0 and call.sinks is None
    dtype = q.dtype if use_sdpa else compute_dtype(q)
    prefix_lengths = call.table.seq_lens.tolist()
    bounds = call.q_indptr.tolist()
    for request, prefix in enumerate(prefix_lengths):
        rows = slice(bounds[request], bounds[request + 1])
        count = rows.stop - rows.start
        if count == 0:
            continue
        old_k, old_v, old_positions = _prefix(call, request, prefix, dtype)
        keys = torch.cat([old_k, k[rows].transpose(0, 1).to(dtype)], 1)
        values = torch.cat([old_v, v[rows].transpose(0, 1).to(dtype)], 1)
        positions = torch.arange(prefix, prefix + count, device=q.device)
        key_positions = torch.cat([old_positions, positions])
        query = q[rows].to(dtype).transpose(0, 1)
        result = out[rows].transpose(0, 1)
        if use_sdpa and prefix == 0 and sliding_window < 0 and keys.shape[-1] == values.shape[-1]:
            result.copy_(_sdpa(query, keys, values, None, scale))
            continue
        block = max(1, _BLOCK_LOGITS // (q.shape[1] * keys.shape[1]))
        for start in range(0, count, block):
            stop = min(start + block, count)
            seen = slice(0, keys.shape[1] - count + stop)
            if sliding_window >= 0:
                oldest = prefix + start - sliding_window
                seen = slice(int(torch.searchsorted(key_positions, oldest)), seen.stop)
            at, seen_at = positions[start:stop, None], key_positions[seen]
            hidden = seen_at > at
            if sliding_window >= 0:
                hidden |= seen_at < at - sliding_window
            part, part_k, part_v = query[:, start:stop], keys[:, seen], values[:, seen]
            result[:, start:stop] = (
                _sdpa(part, part_k, part_v, ~hidden, scale)
                if use_sdpa
                else _softmax(part, part_k, part_v, hidden, scale, logit_cap, call.sinks)
            )


def _prefix(
    call: ExtendCall, request: int, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k [H, n, D], v [H, n, Dv], positions [n] of the cached tokens, in order of position."""
    kv, layer, table = call.kv, call.layer, call.table
    device = kv.k_bf16[0].device
    keys, values, positions = [], [], []
    for indptr, indices, pos, k_pages, v_pages in (
        (table.bfp8_indptr, table.bfp8_indices, table.bfp8_pos, kv.k_bfp8, kv.v_bfp8),
        (table.bf16_indptr, table.bf16_indices, table.bf16_pos, kv.k_bf16, kv.v_bf16),
    ):
        own = slice(int(indptr[request]), int(indptr[request + 1]))
        own_indices = indices[own].to(device)
        keys.append(load_pages(k_pages[layer], own_indices, dtype))
        values.append(load_pages(v_pages[layer], own_indices, dtype))
        positions.append(pos[own].to(device)[:, None] + torch.arange(PAGE, device=device))
    position = torch.cat(positions).flatten()
    order = position.argsort()
    order = order[position[order] < length]
    k = torch.cat(keys).transpose(0, 1).flatten(1, 2).index_select(1, order)
    v = torch.cat(values).transpose(0, 1).flatten(1, 2).index_select(1, order)
    return k, v, position[order]


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """q [Hq, n, D], k [H, m, D], v [H, m, Dv]; causal when visible is None -> [Hq, n, Dv]."""
    return scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )[0]


def _softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    logit_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    rows = q.shape[1]
    per_kv_head = (q * scale).reshape(k.shape[0], -1, q.shape[2])
    logits = soft_cap(torch.bmm(per_kv_head, k.transpose(1, 2)), logit_cap)
    logits = logits.view(q.shape[0], rows, -1).masked_fill_(hidden, -torch.inf)
    if sinks is None:
        weights = logits.softmax(-1)
    else:
        column = sinks.to(logits)[:, None, None].expand(-1, rows, 1)
        weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    weights = weights.reshape(k.shape[0], -1, k.shape[1])
    return torch.bmm(weights, v).view(q.shape[0], rows, -1)
