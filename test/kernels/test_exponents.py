"""Attention over pages whose exponents are anything a byte can be, and over infinite values."""

import dataclasses

import numpy as np
import pytest
import torch
from kernel_cases import Cache, Spec, absolute, fill_exponents

from hma_kernels import GROUP, PAGE, DecodePlan, extend_attention, reference
from hma_kernels.layout import data_offset, exponent_offset

# Below E = 7 a group's values are under 2^-120: the fast path may round them to 0.
TINY = 2.0**-117


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("trial", range(10))
def test_any_exponent(rng, make_cache, trial, dtype):
    heads, gqa_group_size = int(rng.integers(1, 3)), int(rng.choice([1, 4, 5]))
    dim, v_dim = (int(d) for d in rng.choice([32, 64, 128, 256], 2))
    lengths = rng.integers(1, 140, rng.integers(1, 5)).tolist()
    cache = make_cache(Spec(lengths, heads, dim, v_dim, layers=1))
    # Keys of any magnitude, with queries (2^106 .. 2^-84) that make their logits moderate.
    top = int(rng.integers(20, 211))
    fill_exponents(rng, cache.kv.k_bfp8[0], top - 6, top)
    fill_exponents(rng, cache.kv.v_bfp8[0], 0, 240)
    q = np.ldexp(rng.standard_normal((len(lengths), heads * gqa_group_size, dim)), 126 - top)
    q = torch.from_numpy(q).to(dtype)
    kv, table = cache.reference(0)
    # BF16 keys would dwarf or drown in these logits: they count as zeros here.
    cache.kv.k_bf16[0].mul_(0).nan_to_num_(0)
    kv = dataclasses.replace(kv, k_bf16=np.zeros_like(kv.k_bf16))

    plan = DecodePlan(cache.kv, cache.table, num_q_heads=heads * gqa_group_size)
    got = plan.run(q, 0, scale=dim**-0.5).double().numpy()
    truth = reference.decode_attention(q.double().numpy(), kv, table, scale=dim**-0.5)
    size = reference.decode_attention(q.double().numpy(), absolute(kv), table, scale=dim**-0.5)
    bound = 3e-3 if dtype == torch.bfloat16 else 1e-6
    rounding = np.abs(truth) * (torch.finfo(dtype).eps / 2)
    error = np.abs(got - truth)
    assert np.isfinite(got).all()
    assert (error <= np.maximum(rounding, bound * size) + TINY).all(), (
        f"{np.max(error / (bound * size + TINY)):.3g} times the bound"
    )


@pytest.mark.parametrize("where", ["k", "v"])
def test_infinite_values_show(rng, make_cache, where):
    """A visible infinity makes the head's output infinite or NaN, never a plausible number."""
    visible = np.array([])
    while not len(visible):  # pages are of random formats
        cache = make_cache(Spec([100], 2, 64, 64, layers=1))
        visible = np.flatnonzero(cache.table.bfp8_pos.numpy() < 100)
    at = int(rng.choice(visible))
    page, pos = int(cache.table.bfp8_indices[at]), int(cache.table.bfp8_pos[at])
    row, group = int(rng.integers(min(PAGE, 100 - pos))), int(rng.integers(64 // GROUP))
    pages = getattr(cache.kv, f"{where}_bfp8")[0]
    head = pages[page, 0].view(-1)
    head[exponent_offset(row, group)] = 255
    head[data_offset(row, group) :][:GROUP] = 0  # so a packer leaves what is far smaller
    head[data_offset(row, group)] = 64
    q = torch.ones(1, 4, 64, dtype=torch.bfloat16)
    got = DecodePlan(cache.kv, cache.table, num_q_heads=4).run(q, 0, scale=1e-3)
    wild = ~torch.isfinite(got[0])
    assert wild[:2].any(-1).all(), "heads that read it"
    assert not wild[2:].any(), "heads that do not"


def test_any_page_id_is_checked(make_cache):
    cache = make_cache(Spec([40], 1, 32, 32))
    fields = vars(cache.table)
    for bad in (-1, 1 << 40):
        # Of both formats: a page that lies beyond the request's tokens need not be looked at.
        ids = {
            name: torch.full_like(fields[name], bad) for name in ("bfp8_indices", "bf16_indices")
        }
        broken = Cache(cache.kv, dataclasses.replace(cache.table, **ids))
        q = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
        with pytest.raises(IndexError):
            DecodePlan(broken.kv, broken.table, num_q_heads=1).run(q, 0, scale=1.0)
        with pytest.raises(IndexError):
            rows = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
            extend_attention(
                rows, rows, rows, broken.kv, 0, broken.table, torch.tensor([0, 1]), scale=1.0
            )
