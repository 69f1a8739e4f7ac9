"""DecodePlan against the float64 reference on random paged caches."""

import numpy as np
import pytest
import torch
from kernel_cases import Cache, Spec, empty_table

from hma_kernels import DecodePlan, PagedKV, PageTable, reference
from hma_kernels.portable import attention as portable_attention

DIMS = [32, 64, 96, 128]


def random_options(rng):
    return {
        "logit_cap": float(rng.choice([0, 0, 5, 30])),
        "sliding_window": int(rng.choice([-1, -1, 0, 1, 17, 32, 100])),
    }


def queries(rng, batch, heads, dim, magnitude, dtype):
    q = np.ldexp(rng.standard_normal((batch, heads, dim)), -magnitude)
    return torch.from_numpy(q).to(dtype)


def run(cache, q, layer, *, scale, logit_cap=0.0, sliding_window=-1):
    heads = q.shape[1]
    plan = DecodePlan(cache.kv, cache.table, num_q_heads=heads, sliding_window=sliding_window)
    return plan.run(q, layer, scale=scale, logit_cap=logit_cap)


def alone(cache, request):
    """The table of one request of the batch."""
    table, fields = cache.table, {"seq_lens": cache.table.seq_lens[request : request + 1]}
    for name in ("bfp8", "bf16"):
        start, stop = getattr(table, f"{name}_indptr")[request : request + 2].tolist()
        fields[f"{name}_indptr"] = torch.tensor([0, stop - start])
        fields[f"{name}_indices"] = getattr(table, f"{name}_indices")[start:stop]
        fields[f"{name}_pos"] = getattr(table, f"{name}_pos")[start:stop]
    return Cache(cache.kv, PageTable(**fields))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("trial", range(12))
def test_equals_reference(rng, make_cache, assert_near, monkeypatch, trial, dtype):
    magnitude = 0 if dtype == torch.float16 else int(rng.choice([0, 0, -60, 60]))
    v_magnitude = 0 if dtype == torch.float16 else int(rng.choice([0, 0, -100, 100]))
    chunk = int(rng.choice([1, 1 << 16, 1 << 19]))
    monkeypatch.setattr(portable_attention, "_CHUNK_ELEMENTS", chunk)
    heads, gqa_group_size = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 8]))
    dim, v_dim = (int(d) for d in rng.choice(DIMS, 2))
    lengths = rng.integers(1, 150, rng.integers(1, 7)).tolist()
    cache = make_cache(Spec(lengths, heads, dim, v_dim, magnitude, v_magnitude))
    q = queries(rng, len(lengths), heads * gqa_group_size, dim, magnitude, dtype)
    options = random_options(rng)
    layer = int(rng.integers(2))

    got = run(cache, q, layer, scale=dim**-0.5, **options)
    assert got.dtype == dtype
    expected = reference.decode_attention(
        q.double().numpy(), *cache.reference(layer), scale=dim**-0.5, **options
    )
    assert_near(got, expected, 1e-12 if dtype == torch.float32 else 1e-5)


@pytest.mark.parametrize("trial", range(4))
def test_float32_row_does_not_depend_on_the_batch(
    rng, make_cache, assert_same_float32, monkeypatch, trial
):
    monkeypatch.setattr(portable_attention, "_CHUNK_ELEMENTS", int(rng.choice([1 << 14, 1 << 19])))
    lengths = rng.integers(1, 300, 8).tolist()
    cache = make_cache(Spec(lengths, 2, 64, 32))
    q = queries(rng, 8, 8, 64, 0, torch.float32)
    options = random_options(rng)
    together = run(cache, q, 1, scale=0.125, **options)
    for request in range(8):
        own = slice(request, request + 1)
        by_itself = run(alone(cache, request), q[own], 1, scale=0.125, **options)
        assert_same_float32(by_itself, together[own])


def test_nothing_to_see_is_zero(rng, make_cache):
    cache = make_cache(Spec([0, 40, 0], 2, 32, 32))
    q = queries(rng, 3, 2, 32, 0, torch.bfloat16)
    got = run(cache, q, 0, scale=1.0)
    assert not got[[0, 2]].any() and got[1].any()
    empty = Cache(cache.kv, empty_table(3))
    assert not run(empty, q, 0, scale=1.0).any()
    assert run(Cache(cache.kv, empty_table(0)), q[:0], 0, scale=1.0).shape == (0, 2, 32)


def test_writes_into_out_and_takes_strides(rng, make_cache):
    cache = make_cache(Spec([70, 3], 2, 64, 32))
    q = queries(rng, 4, 4, 64, 0, torch.bfloat16)[::2]
    out = torch.empty(2, 4, 32, dtype=torch.bfloat16)
    plan = DecodePlan(cache.kv, cache.table, num_q_heads=4)
    assert plan.run(q, 0, scale=0.1, out=out) is out
    assert torch.equal(out, plan.run(q.contiguous(), 0, scale=0.1))


def test_refuses_what_does_not_fit(make_cache):
    cache = make_cache(Spec([40], 2, 64, 32))
    with pytest.raises(ValueError, match="num_q_heads is 3"):
        DecodePlan(cache.kv, cache.table, num_q_heads=3)
    plan = DecodePlan(cache.kv, cache.table, num_q_heads=2)
    with pytest.raises(ValueError, match="q is"):
        plan.run(torch.zeros(1, 2, 32), 0, scale=1.0)
    with pytest.raises(TypeError, match="float64"):
        plan.run(torch.zeros(1, 2, 64, dtype=torch.float64), 0, scale=1.0)
    with pytest.raises(ValueError, match="out is"):
        plan.run(torch.zeros(1, 2, 64), 0, scale=1.0, out=torch.zeros(1, 2, 64))
    with pytest.raises(ValueError, match="out has strides"):
        plan.run(torch.zeros(1, 2, 64), 0, scale=1.0, out=torch.zeros(1, 2, 64)[..., ::2])
    kv = cache.kv
    with pytest.raises(ValueError, match="v_bfp8"):
        PagedKV(kv.k_bfp8, kv.k_bfp8, kv.k_bf16, kv.v_bf16)
    fields = vars(cache.table)
    with pytest.raises(ValueError, match="seq_lens is"):
        PageTable(**fields | {"seq_lens": torch.tensor([40], dtype=torch.int32)})
    with pytest.raises(ValueError, match="bf16_indptr must rise"):
        PageTable(**fields | {"bf16_indptr": torch.tensor([0, 99])})
    with pytest.raises(ValueError, match="bfp8_indptr has 3"):
        PageTable(**fields | {"bfp8_indptr": torch.tensor([0, 0, 0])})
    with pytest.raises(ValueError, match="must match"):
        PageTable(**fields | {"bfp8_pos": torch.zeros(99, dtype=torch.int64)})
