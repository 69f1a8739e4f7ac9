"""The package's operations: they check their arguments and call the device's implementation."""

import torch

from hma_kernels.base import DecodeCall, ExtendCall
from hma_kernels.implementation import implementation_for
from hma_kernels.layout import GROUP, TILE, TILE_BYTES, Rounding, padded
from hma_kernels.paged import PagedKV, PageTable

_SOURCES = (torch.float32, torch.bfloat16, torch.float16)
_TARGETS = (torch.bfloat16, torch.float32, torch.float64)


def bfp8_pack(
    x: torch.Tensor, *, rounding: Rounding = "device", out: torch.Tensor | None = None
) -> torch.Tensor:
    """Pack x into BFP8 tiles.

    x: float32, bfloat16 or float16 [..., H, W], any strides; H and W are zero-padded to multiples
    of 32. rounding: "device" (half away from zero on bfloat16, float32 truncated first) for K and
    V, "host" (half to even on float32) for weights.
    Returns uint8 [..., ceil(H/32), ceil(W/32), 1088]: `out` if given, which must be contiguous.
    Raises TypeError for another dtype, ValueError for another rounding or a shape that does not
    fit.
    """
    _check_source(x, rounding)
    if x.dim() < 2:
        raise ValueError(f"bfp8_pack: x has shape {list(x.shape)}; needs [..., H, W]")
    *lead, height, width = x.shape
    shape = (*lead, padded(height) // TILE, padded(width) // TILE, TILE_BYTES)
    out = _result("bfp8_pack", out, shape, torch.uint8, x.device)
    if out.numel():
        implementation_for(x.device).pack(x, rounding, out)
    return out


def bfp8_unpack(
    tiles: torch.Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The exact values of BFP8 tiles: uint8 [..., Ht, Wt, 1088] -> dtype [..., Ht*32, Wt*32].

    dtype: bfloat16, float32 or float64; all three hold the same values. out: where they are
    written, contiguous.
    Raises TypeError for another dtype, ValueError for a shape that does not fit.
    """
    if dtype not in _TARGETS:
        raise TypeError(f"bfp8_unpack: dtype is {dtype}; needs one of {_TARGETS}")
    if tiles.dtype != torch.uint8 or tiles.dim() < 3 or tiles.shape[-1] != TILE_BYTES:
        raise ValueError(
            f"bfp8_unpack: tiles are {tiles.dtype} {list(tiles.shape)}; "
            f"needs uint8 [..., Ht, Wt, {TILE_BYTES}]"
        )
    *lead, high, wide, _ = tiles.shape
    shape = (*lead, high * TILE, wide * TILE)
    out = _result("bfp8_unpack", out, shape, dtype, tiles.device)
    if out.numel():
        implementation_for(tiles.device).unpack(tiles, out)
    return out


def bfp8_round(x: torch.Tensor, *, rounding: Rounding = "device") -> torch.Tensor:
    """The values that x has after packing and unpacking; groups lie along the last dimension.

    x: float32 or bfloat16 [..., W], W a multiple of 16. Returns the same shape and dtype; every
    value is exact in bfloat16. On the host it takes bounded memory beside the result.
    Raises TypeError for another dtype, ValueError for another W or rounding.
    """
    _check_source(x, rounding)
    if x.dtype == torch.float16:
        raise TypeError("bfp8_round: x is float16, which cannot hold BFP8's exponent range")
    if x.dim() == 0 or x.shape[-1] % GROUP:
        raise ValueError(f"bfp8_round: x has shape {list(x.shape)}; W must divide by {GROUP}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        implementation_for(x.device).round_values(x, rounding, out)
    return out


def bfp8_write_rows(
    pages: torch.Tensor, page_ids: torch.Tensor, rows: torch.Tensor, x: torch.Tensor
) -> None:
    """Pack token rows into pages, in place, with "device" rounding.

    x: float32, bfloat16 or float16 [n, heads, W], any strides; x[i] becomes row rows[i] of page
    page_ids[i]. pages: uint8 [P, heads, W/32, 1088], each page contiguous. page_ids, rows: int64
    [n], rows in 0..31, no (page, row) twice. No byte of another row changes, because no group
    spans two rows.
    Raises TypeError for another dtype, ValueError for shapes that do not fit, IndexError for a
    page or row that does not exist.
    """
    _check_source(x, "device")
    if x.dim() != 3:
        raise ValueError(f"bfp8_write_rows: x has shape {list(x.shape)}; needs [n, heads, W]")
    count, heads, width = x.shape
    expected = (heads, width // TILE, TILE_BYTES)
    if width % TILE or pages.dtype != torch.uint8 or tuple(pages.shape[1:]) != expected:
        raise ValueError(
            f"bfp8_write_rows: pages are {pages.dtype} {list(pages.shape)} and x "
            f"{list(x.shape)}; needs uint8 [P, heads, W/{TILE}, {TILE_BYTES}] and [n, heads, W]"
        )
    if page_ids.shape != (count,) or rows.shape != (count,):
        raise ValueError(
            f"bfp8_write_rows: page_ids {list(page_ids.shape)} and rows {list(rows.shape)} "
            f"must both be [{count}]"
        )
    if count:
        implementation_for(x.device).write_rows(pages, page_ids, rows, x)


MAX_QUERIES = 8  # of a request, in one decode step


class DecodePlan:
    """One decode step of a batch: one query per request, at position seq_len - 1.

    Everything that is the same for all layers is computed here. sliding_window w >= 0 limits a
    query at position p to positions >= p - w; -1 is no limit. Pages without a visible row are
    never read.
    q_indptr: several queries a request, as in verifying drafted tokens, whose K and V are in the
    table's pages: int64 [B+1] on the host. Request b's queries are rows q_indptr[b] up to
    q_indptr[b+1] of q, 1 to 8 of them, at its last positions; each sees none later than its own.
    Raises ValueError if num_q_heads is no multiple of the KV heads or for another q_indptr,
    IndexError for a page id outside kv.
    """

    def __init__(
        self,
        kv: PagedKV,
        table: PageTable,
        *,
        num_q_heads: int,
        sliding_window: int = -1,
        q_indptr: torch.Tensor | None = None,
    ) -> None:
        if num_q_heads <= 0 or num_q_heads % kv.kv_heads:
            raise ValueError(
                f"num_q_heads is {num_q_heads}; needs a multiple of {kv.kv_heads} KV heads"
            )
        rows = table.batch_size if q_indptr is None else _query_rows(q_indptr, table.batch_size)
        self._q_shape = (rows, num_q_heads, kv.head_dim)
        self._out_shape = (rows, num_q_heads, kv.v_head_dim)
        implementation = implementation_for(kv.device)
        self._plan = implementation.decode_plan(kv, table, num_q_heads, sliding_window, q_indptr)

    def refresh(self) -> None:
        """Plan anew after the contents of the table's tensors have changed.

        Without q_indptr it allocates nothing on a GPU and does not wait for it, so that a CUDA
        graph that captured `run` works on the new contents.
        """
        self._plan.refresh()

    def run(
        self,
        q: torch.Tensor,
        layer: int,
        *,
        scale: float,
        logit_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [B, Hq, D], with q_indptr [T, Hq, D] -> [.., Hq, Dv] in q's dtype; zeros for a query
        with nothing to see.

        For bfloat16 and float16 queries it computes in float32. For float32 queries it computes in
        float64 and rounds once, so that a row does not depend on what else is in the batch.
        logit_cap c > 0 applies c * tanh(logit / c). sinks: [Hq], each head's attention sink: a
        logit without a key, which takes its share of the softmax and adds no value. No cap applies
        to it, and -inf is no sink. float32 is read where it lies; another dtype is copied in every
        call. out: where the result is written, contiguous.
        Raises TypeError for another dtype of q or sinks, ValueError for another shape of q, sinks
        or out.
        """
        _check_query(q)
        if tuple(q.shape) != self._q_shape:
            raise ValueError(f"q is {list(q.shape)}; needs {list(self._q_shape)}")
        out = _result("DecodePlan.run", out, self._out_shape, q.dtype, q.device)
        if out.numel():
            call = DecodeCall(q, layer, scale, logit_cap, out, _sinks(sinks, q))
            self._plan.run(call)
        return out


def extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: PagedKV,
    layer: int,
    table: PageTable,
    q_indptr: torch.Tensor,
    *,
    scale: float,
    logit_cap: float = 0.0,
    sliding_window: int = -1,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of B requests' new rows over their cached prefixes and over themselves.

    q [T, Hq, D], k [T, H, D], v [T, H, Dv]: the new rows of one dtype, K and V with the values
    that are stored. table: each request's cached prefix, of length seq_lens[b]. q_indptr: int64
    [B+1] on the host; request b owns rows q_indptr[b]..q_indptr[b+1]-1, the first of them at
    position seq_lens[b]. A row at position p sees positions <= p and, with sliding_window w >= 0,
    >= p - w. sinks: as in DecodePlan.run. Returns [T, Hq, Dv] in q's dtype. For float32 queries it
    computes in float64 and rounds once, so that a row does not depend on how its prompt was cut
    into prefix and new rows.
    Raises TypeError for a dtype other than bfloat16, float16, float32, ValueError for shapes
    that do not fit, IndexError for a page id outside kv.
    """
    _check_query(q)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; they must be one")
    rows, heads = q.shape[0], q.shape[1]
    if heads % kv.kv_heads or q.shape[2] != kv.head_dim:
        raise ValueError(
            f"q is {list(q.shape)}; needs [T, multiple of {kv.kv_heads}, {kv.head_dim}]"
        )
    for name, value, dim in (("k", k, kv.head_dim), ("v", v, kv.v_head_dim)):
        if tuple(value.shape) != (rows, kv.kv_heads, dim):
            raise ValueError(f"{name} is {list(value.shape)}; needs {[rows, kv.kv_heads, dim]}")
    if (
        q_indptr.shape != (table.batch_size + 1,)
        or int(q_indptr[0]) != 0
        or int(q_indptr[-1]) != rows
        or bool((q_indptr.diff() < 0).any())
    ):
        raise ValueError(
            f"q_indptr is {q_indptr.tolist()}; needs {table.batch_size + 1} entries, "
            f"rising from 0 to {rows}"
        )
    out = q.new_empty(rows, heads, kv.v_head_dim)
    if out.numel():
        call = ExtendCall(
            *(q, k, v, kv, layer, table, q_indptr, scale, logit_cap, sliding_window, out),
            _sinks(sinks, q),
        )
        implementation_for(q.device).extend(call)
    return out


def _query_rows(q_indptr: torch.Tensor, batch_size: int) -> int:
    if q_indptr.device.type != "cpu" or q_indptr.dtype != torch.int64:
        given = f"{q_indptr.dtype} on {q_indptr.device}"
    elif (
        q_indptr.shape == (batch_size + 1,)
        and int(q_indptr[0]) == 0
        and all(1 <= count <= MAX_QUERIES for count in q_indptr.diff().tolist())
    ):
        return int(q_indptr[-1])
    else:
        given = str(q_indptr.tolist())
    raise ValueError(
        f"DecodePlan: q_indptr is {given}; needs int64 on the host, {batch_size + 1} entries that "
        f"rise from 0, each by 1 to {MAX_QUERIES} queries; extend_attention takes more"
    )


def _check_query(q: torch.Tensor) -> None:
    if q.dtype not in _SOURCES:
        raise TypeError(f"attention: q is {q.dtype}; needs bfloat16, float16 or float32")


def _sinks(sinks: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """Contiguous float32 [Hq]."""
    if sinks is None:
        return None
    if sinks.dtype not in _SOURCES:
        raise TypeError(f"attention: sinks are {sinks.dtype}; needs bfloat16, float16 or float32")
    if sinks.shape != (q.shape[1],) or sinks.device != q.device:
        raise ValueError(
            f"attention: sinks are {list(sinks.shape)} on {sinks.device}; "
            f"needs [{q.shape[1]}], one for each query head, on {q.device}"
        )
    return sinks.detach().float().contiguous()


def _check_source(x: torch.Tensor, rounding: str) -> None:
    if x.dtype not in _SOURCES:
        raise TypeError(f"BFP8 packs float32, bfloat16 or float16; x is {x.dtype}")
    if rounding not in ("device", "host"):
        raise ValueError(f"rounding is {rounding!r}; needs 'device' or 'host'")


def _result(
    what: str,
    out: torch.Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"{what}: out is {out.dtype} {list(out.shape)} on {out.device}; "
            f"needs {dtype} {list(shape)} on {device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"{what}: out has strides {out.stride()}; it must be contiguous")
    return out
