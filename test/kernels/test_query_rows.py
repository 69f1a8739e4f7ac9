"""Decode of several queries a request: each as if it were alone at its own position."""

import dataclasses

import numpy as np
import pytest
import torch
from kernel_cases import Cache, Spec
from test_sinks import assert_close, normal, random_sinks, tokens_in_order, truth

from hma_kernels import PAGE, DecodePlan, PageTable, extend_attention, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NOISE = {torch.float32: 1e-12, torch.float16: 2e-5, torch.bfloat16: 2e-5}


def random_counts(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, torch.Tensor]:
    counts = rng.integers(1, 9, batch)
    return counts, torch.tensor([0, *counts.cumsum()], dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trial", range(8))
def test_equals_a_softmax_in_float64(rng, make_cache, trial, dtype):
    heads, group = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 5, 8]))
    dim, v_dim = (int(d) for d in rng.choice([32, 64, 96, 128], 2))
    # Few tokens, a page or two that end among the new rows, and many pages.
    lengths = [8, *rng.integers(8, 40, 2).tolist(), PAGE, PAGE + 3, int(rng.integers(300, 900))]
    counts, indptr = random_counts(rng, len(lengths))
    cache = make_cache(Spec(lengths, heads, dim, v_dim))
    q = normal(rng, (int(indptr[-1]), heads * group, dim), dtype)
    window = int(rng.choice([-1, 0, 1, 5, 17, 31, 127]))
    options = {"scale": dim**-0.5, "logit_cap": float(rng.choice([0, 0, 5]))}
    sinks = random_sinks(rng, heads * group) if rng.random() < 0.5 else None
    print(f"{lengths=} {counts=} {heads=} {group=} {dim=} {v_dim=} {window=} {options} {sinks=}")

    plan = DecodePlan(
        *(cache.kv, cache.table), num_q_heads=heads * group, sliding_window=window, q_indptr=indptr
    )
    got = plan.run(q, 1, sinks=sinks, **options)
    assert got.dtype == dtype and got.shape == (len(q), heads * group, v_dim)
    columns = np.full(heads * group, -np.inf) if sinks is None else sinks.double().numpy()
    defined = reference.decode_attention(
        *(q.double().numpy(), *cache.reference(1)),
        **options, sliding_window=window, sinks=columns, q_indptr=indptr.numpy(),
    )  # fmt: skip
    for request, length in enumerate(lengths):
        k, v = tokens_in_order(cache, request)
        key = np.arange(length)
        for row in range(indptr[request], indptr[request + 1]):
            at = length - int(indptr[request + 1]) + row
            hidden = (key > at) | ((window >= 0) & (key < at - window))
            expected = truth(q[row].double().numpy(), k, v, hidden, sinks=columns, **options)
            assert_close(got[row], expected, NOISE[dtype])
            assert_close(torch.from_numpy(defined[row]), expected, 1e-12)


@pytest.mark.parametrize("window", [-1, 40])
def test_equals_single_steps_and_prefill_in_float32(rng, make_cache, assert_same_float32, window):
    """Every row has the value of a step of its own, and of a prefill after the same tokens."""
    lengths = rng.integers(8, 200, 5).tolist()
    counts, indptr = random_counts(rng, 5)
    cache = make_cache(Spec(lengths, 2, 64, 32))
    q = normal(rng, (int(indptr[-1]), 6, 64), torch.float32)
    common = {"num_q_heads": 6, "sliding_window": window}
    got = DecodePlan(cache.kv, cache.table, **common, q_indptr=indptr).run(q, 1, scale=0.2)

    tokens = [tokens_in_order(cache, request) for request in range(5)]
    prefix = dataclasses.replace(cache.table, seq_lens=cache.table.seq_lens - indptr.diff())
    new_k, new_v = (
        torch.from_numpy(np.concatenate([t[i][-n:] for t, n in zip(tokens, counts, strict=True)]))
        for i in (0, 1)
    )
    prefilled = extend_attention(
        *(q, new_k.float(), new_v.float(), cache.kv, 1, prefix, indptr),
        scale=0.2, sliding_window=window,
    )  # fmt: skip
    assert_same_float32(got, prefilled)

    for step in range(int(counts.max())):
        has = torch.from_numpy(np.flatnonzero(counts > step))
        ends = cache.table.seq_lens - indptr.diff() + step + 1
        table = dataclasses.replace(cache.table, seq_lens=ends)
        whole = q[(indptr[:-1] + step).clamp(max=len(q) - 1)]
        alone = DecodePlan(cache.kv, table, **common).run(whole, 1, scale=0.2)
        assert_same_float32(alone[has], got[indptr[:-1][has] + step])


def test_one_query_each_is_plain_decode(rng, make_cache):
    lengths = rng.integers(1, 300, 6).tolist()
    cache = make_cache(Spec(lengths, 2, 64, 64))
    q = normal(rng, (6, 8, 64), torch.bfloat16)
    plain = DecodePlan(cache.kv, cache.table, num_q_heads=8)
    rows = DecodePlan(cache.kv, cache.table, num_q_heads=8, q_indptr=torch.arange(7))
    assert torch.equal(rows.run(q, 0, scale=0.1), plain.run(q, 0, scale=0.1))


def test_rows_before_the_first_token_are_zero(rng, make_cache):
    cache = make_cache(Spec([2, 0], 1, 32, 32))
    plan = DecodePlan(cache.kv, cache.table, num_q_heads=2, q_indptr=torch.tensor([0, 4, 7]))
    got = plan.run(normal(rng, (7, 2, 32), torch.bfloat16), 0, scale=1.0)
    assert got.isfinite().all()
    assert not got[[0, 1, 4, 5, 6]].any() and got[2].any() and got[3].any()


def test_refresh_sees_new_contents_of_the_table(rng, make_cache):
    cache = make_cache(Spec([70, 90], 2, 64, 64))
    q, indptr = normal(rng, (7, 4, 64), torch.bfloat16), torch.tensor([0, 3, 7])
    plan = DecodePlan(cache.kv, cache.table, num_q_heads=4, q_indptr=indptr)
    cache.table.seq_lens.sub_(10)
    plan.refresh()
    again = Cache(cache.kv, PageTable(**vars(cache.table)))
    expected = DecodePlan(again.kv, again.table, num_q_heads=4, q_indptr=indptr)
    assert torch.equal(plan.run(q, 0, scale=0.1), expected.run(q, 0, scale=0.1))


@pytest.mark.parametrize(
    "q_indptr",
    [
        *([0, 1], [0, 0, 1], [0, 9, 10], [1, 2, 3], [0, 2, 1]),
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([0, 1, 2], device="meta"),
    ],
    ids=str,
)
def test_refuses_other_divisions(make_cache, q_indptr):
    cache = make_cache(Spec([40, 40], 2, 64, 32))
    with pytest.raises(ValueError, match="q_indptr is"):
        DecodePlan(cache.kv, cache.table, num_q_heads=2, q_indptr=torch.as_tensor(q_indptr))
