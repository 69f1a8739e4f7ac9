"""extend_attention against the float64 reference, and against itself under other splits."""

import numpy as np
import pytest
import torch
from kernel_cases import Spec

from hma_kernels import (
    PAGE,
    PagedKV,
    PageTable,
    bfp8_pack,
    bfp8_round,
    extend_attention,
    reference,
)
from hma_kernels.portable import prefill as portable_prefill


def normal(rng, shape, dtype):
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("trial", range(8))
def test_equals_reference(rng, make_cache, assert_near, monkeypatch, trial, dtype):
    monkeypatch.setattr(portable_prefill, "_BLOCK_LOGITS", int(rng.choice([1, 5000, 1 << 23])))
    heads, gqa_group_size = int(rng.integers(1, 3)), int(rng.choice([1, 2, 4]))
    dim = int(rng.choice([32, 64, 96]))
    v_dim = dim if rng.random() < 0.5 else 32
    batch = int(rng.integers(1, 4))
    prefixes = (rng.integers(0, 4, batch) * PAGE - rng.integers(0, 2, batch)).clip(0).tolist()
    cache = make_cache(Spec(prefixes, heads, dim, v_dim))
    indptr = np.concatenate([[0], rng.integers(0, 40, batch).cumsum()])
    rows = int(indptr[-1])
    q = normal(rng, (rows, heads * gqa_group_size, dim), dtype)
    k, v = (bfp8_round(normal(rng, (rows, heads, d), torch.float32)) for d in (dim, v_dim))
    options = {
        "scale": dim**-0.5,
        "logit_cap": float(rng.choice([0, 0, 20])),
        "sliding_window": int(rng.choice([-1, -1, 0, 9, 50])),
    }

    got = extend_attention(
        q, k.to(dtype), v.to(dtype), cache.kv, 1, cache.table, torch.from_numpy(indptr), **options
    )
    assert got.dtype == dtype and got.shape == (rows, heads * gqa_group_size, v_dim)
    expected = reference.extend_attention(
        q.double().numpy(), k.to(dtype).double().numpy(), v.to(dtype).double().numpy(),
        *cache.reference(1), indptr, **options,
    )  # fmt: skip
    noise = {torch.float32: 1e-12, torch.float16: 1e-5, torch.bfloat16: 5e-3}[dtype]
    assert_near(got, expected, noise)


def stored(k, v, prefix, bfp8_pages):
    """A cache of the first `prefix` tokens; its first pages BFP8, the others BF16."""
    pages = -(-prefix // PAGE)
    by_page = []
    for x in (k, v):
        padded = torch.full((pages * PAGE, *x.shape[1:]), torch.nan)
        padded[:prefix] = x[:prefix]
        by_page.append(padded.unflatten(0, (pages, PAGE)).transpose(1, 2).contiguous())
    tiles = [bfp8_pack(x)[:, :, 0] for x in by_page]
    kv = PagedKV(tiles[:1], tiles[1:], [by_page[0].bfloat16()], [by_page[1].bfloat16()])
    ids = torch.arange(pages)
    first, rest = ids[:bfp8_pages], ids[bfp8_pages:]
    table = PageTable(
        torch.tensor([0, len(first)]), first, first * PAGE,
        torch.tensor([0, len(rest)]), rest, rest * PAGE,
        torch.tensor([prefix]),
    )  # fmt: skip
    return kv, table


@pytest.mark.parametrize("options", [{}, {"logit_cap": 10.0}, {"sliding_window": 40}], ids=str)
def test_float32_row_does_not_depend_on_the_split(rng, assert_same_float32, options):
    total, heads, dim, v_dim = int(rng.integers(100, 200)), 2, 64, 32
    q = normal(rng, (total, 6, dim), torch.float32)
    k, v = (bfp8_round(normal(rng, (total, heads, d), torch.float32)) for d in (dim, v_dim))

    def rows_after(prefix, bfp8_pages):
        kv, table = stored(k, v, prefix, bfp8_pages)
        new, indptr = slice(prefix, total), torch.tensor([0, total - prefix])
        return extend_attention(
            q[new], k[new], v[new], kv, 0, table, indptr, scale=0.125, **options
        )

    whole = rows_after(0, 0)
    for prefix in (1, 32, 64, 96, int(rng.integers(1, total)), total - 1):
        bfp8_pages = int(rng.integers(0, prefix // PAGE + 1))
        assert_same_float32(rows_after(prefix, bfp8_pages), whole[prefix:])


def test_refuses_what_does_not_fit(make_cache):
    cache = make_cache(Spec([0], 2, 64, 32))
    q, k, v = torch.zeros(4, 2, 64), torch.zeros(4, 2, 64), torch.zeros(4, 2, 32)
    for rows, message in (((q[:, :1], k, v), "q is"), ((q, v, v), "k is"), ((q, k, k), "v is")):
        with pytest.raises(ValueError, match=message):
            extend_attention(*rows, cache.kv, 0, cache.table, torch.tensor([0, 4]), scale=1.0)
    with pytest.raises(ValueError, match="q_indptr"):
        extend_attention(q, k, v, cache.kv, 0, cache.table, torch.tensor([0, 3]), scale=1.0)
