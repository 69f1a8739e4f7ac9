"""Attention sinks: a softmax over one logit more, in float64, and transformers' GPT-OSS."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_cases import Cache, Spec, random_cache

from hma_kernels import PAGE, DecodePlan, bfp8_round, extend_attention, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NOISE = {torch.float32: 1e-12, torch.float16: 2e-5, torch.bfloat16: 2e-5}


def with_column(logits: np.ndarray, sinks: np.ndarray) -> np.ndarray:
    """logits [Hq, n], sinks [Hq] -> weights [Hq, n] of a softmax over n + 1."""
    wide = np.concatenate([logits, sinks[:, None]], 1)
    powers = np.exp(wide - wide.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True))[:, :-1]


def truth(q, k, v, hidden, *, scale, logit_cap, sinks):
    """q [Hq, D], k [n, H, D], v [n, H, Dv], hidden [n] -> float64 [Hq, Dv]."""
    if hidden.all():
        return np.zeros((len(q), v.shape[2]))
    group = len(q) // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k[~hidden], v[~hidden]))
    logits = np.einsum("hd,nhd->hn", q, k) * scale
    if logit_cap > 0:
        logits = logit_cap * np.tanh(logits / logit_cap)
    return np.einsum("hn,nhd->hd", with_column(logits, sinks), v)


def tokens_in_order(cache: Cache, request: int) -> tuple[np.ndarray, np.ndarray]:
    k, v, positions = reference.cached(*cache.reference(1), request)
    order = np.argsort(positions)
    assert positions[order].tolist() == list(range(int(cache.table.seq_lens[request])))
    return k[order], v[order]


def random_sinks(rng: np.random.Generator, heads: int) -> torch.Tensor:
    """Beside the logits, far above and far below them, and none."""
    kinds = np.stack([rng.normal(0, 3, heads), rng.uniform(20, 80, heads)])
    kinds = np.concatenate([kinds, [[-90.0] * heads, [-np.inf] * heads, [2000.0] * heads]])
    chosen = kinds[rng.choice(5, heads, p=[0.6, 0.1, 0.1, 0.1, 0.1]), np.arange(heads)]
    return torch.from_numpy(chosen).float()


def assert_close(got: torch.Tensor, expected: np.ndarray, noise: float) -> None:
    """Of a head under a sink far above its logits only subnormal numbers may be left."""
    info = torch.finfo(got.dtype)
    allowed = info.eps / 2 * np.abs(expected) + info.smallest_normal * info.eps
    allowed += noise * np.abs(expected).max(-1, keepdims=True, initial=0)
    error = np.abs(got.double().numpy() - expected)
    assert np.isfinite(error).all()
    assert (error <= allowed).all(), f"error / allowed is {np.max(error / allowed)}"


def normal(rng, shape, dtype):
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def random_options(rng, dim):
    return {
        "scale": dim**-0.5,
        "logit_cap": float(rng.choice([0, 0, 5])),
        "sliding_window": int(rng.choice([-1, -1, 0, 1, 17, 127])),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trial", range(10))
def test_decode(rng, make_cache, trial, dtype):
    heads, group = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 5, 8]))
    dim, v_dim = (int(d) for d in rng.choice([32, 64, 96, 128], 2))
    lengths = [*rng.integers(1, 40, 4).tolist(), 0, int(rng.integers(300, 900))]
    cache = make_cache(Spec(lengths, heads, dim, v_dim))
    q = normal(rng, (len(lengths), heads * group, dim), dtype)
    sinks, options = random_sinks(rng, heads * group), random_options(rng, dim)
    window = options.pop("sliding_window")
    plan = DecodePlan(cache.kv, cache.table, num_q_heads=heads * group, sliding_window=window)

    got = plan.run(q, 1, sinks=sinks, **options)
    expected = []
    for request, length in enumerate(lengths):
        k, v = tokens_in_order(cache, request)
        position = np.arange(length)
        hidden = (position < length - 1 - window) & (window >= 0)
        expected.append(
            truth(
                q[request].double().numpy(), k, v, hidden, sinks=sinks.double().numpy(), **options
            )
        )
    assert_close(got, np.stack(expected), NOISE[dtype])
    defined = reference.decode_attention(
        *(q.double().numpy(), *cache.reference(1)),
        **options, sliding_window=window, sinks=sinks.double().numpy(),
    )  # fmt: skip
    assert_close(torch.from_numpy(defined), np.stack(expected), 1e-12)
    none = plan.run(q, 1, **options)
    below = torch.full_like(sinks, -torch.inf)
    assert torch.equal(plan.run(q, 1, sinks=below, **options), none)


def test_decode_of_requests_with_pages_of_one_format(rng, make_cache):
    lengths = rng.integers(1, PAGE, 24).tolist()
    cache = make_cache(Spec(lengths, 2, 64, 32))
    for name in ("bfp8", "bf16"):
        pages = getattr(cache.table, f"{name}_indptr").diff()
        assert (pages == 0).any() and (pages > 0).any()
    q, sinks = normal(rng, (24, 8, 64), torch.float32), random_sinks(rng, 8)
    got = DecodePlan(cache.kv, cache.table, num_q_heads=8).run(q, 1, scale=0.2, sinks=sinks)
    for request, length in enumerate(lengths):
        expected = truth(
            *(q[request].double().numpy(), *tokens_in_order(cache, request)),
            np.zeros(length, bool), scale=0.2, logit_cap=0, sinks=sinks.double().numpy(),
        )  # fmt: skip
        assert_close(got[request], expected, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trial", range(6))
def test_extend(rng, make_cache, trial, dtype):
    heads, group = int(rng.integers(1, 3)), int(rng.choice([1, 2, 8]))
    dim, v_dim = (int(d) for d in rng.choice([32, 64, 96], 2))
    prefixes = [0, *rng.integers(0, 150, 2).tolist()]
    cache = make_cache(Spec(prefixes, heads, dim, v_dim))
    indptr = np.concatenate([[0], rng.integers(0, 50, 3).cumsum()])
    rows = int(indptr[-1])
    q = normal(rng, (rows, heads * group, dim), dtype)
    k, v = (bfp8_round(normal(rng, (rows, heads, d), torch.float32)) for d in (dim, v_dim))
    k, v = k.to(dtype), v.to(dtype)
    sinks, options = random_sinks(rng, heads * group), random_options(rng, dim)

    got = extend_attention(
        *(q, k, v, cache.kv, 1, cache.table, torch.from_numpy(indptr)), sinks=sinks, **options
    )
    arrays = [x.double().numpy() for x in (q, k, v)]
    defined = reference.extend_attention(
        *(*arrays, *cache.reference(1), indptr), sinks=sinks.double().numpy(), **options
    )
    window = options.pop("sliding_window")
    for request, prefix in enumerate(prefixes):
        old_k, old_v = tokens_in_order(cache, request)
        own = slice(indptr[request], indptr[request + 1])
        all_k, all_v = (
            np.concatenate([old_k, arrays[1][own]]),
            np.concatenate([old_v, arrays[2][own]]),
        )
        key = np.arange(len(all_k))
        for row in range(own.start, own.stop):
            at = prefix + row - own.start
            hidden = (key > at) | ((window >= 0) & (key < at - window))
            expected = truth(
                *(arrays[0][row], all_k, all_v, hidden), sinks=sinks.double().numpy(), **options
            )
            assert_close(got[row], expected, NOISE[dtype])
            assert_close(torch.from_numpy(defined[row]), expected, 1e-12)


@pytest.mark.parametrize("window", [None, 128, 33])
def test_equals_gpt_oss(rng, make_cache, window):
    """Prefill of the last rows and decode of the last one, as transformers computes them."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    masks = pytest.importorskip("transformers.masking_utils")
    heads, group, dim, total = 2, 8, 64, int(rng.integers(200, 400))
    cache = make_cache(Spec([total], heads, dim, dim))
    k, v = (torch.from_numpy(x) for x in tokens_in_order(cache, 0))
    new = int(rng.integers(1, 60))
    q = normal(rng, (new, heads * group, dim), torch.float32)
    sinks = torch.from_numpy(rng.normal(0, 3, heads * group)).float()

    sees = (
        masks.causal_mask_function
        if window is None
        else masks.sliding_window_causal_mask_function(window)
    )
    rows, keys = torch.arange(total - new, total)[:, None], torch.arange(total)[None, :]
    visible = torch.as_tensor(sees(0, 0, rows, keys)).expand(new, total)
    mask = torch.zeros(new, total, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    layer = SimpleNamespace(num_key_value_groups=group, sinks=sinks.double(), training=False)
    expected, _ = gpt_oss.eager_attention_forward(
        *(layer, q.double().transpose(0, 1)[None]),
        *(k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask[None, None], dim**-0.5),
    )
    options = {"scale": dim**-0.5, "sinks": sinks}
    sliding_window = -1 if window is None else window - 1

    plan = DecodePlan(
        cache.kv, cache.table, num_q_heads=heads * group, sliding_window=sliding_window
    )
    assert_close(plan.run(q[-1:], 1, **options), expected[0, -1:].numpy(), 1e-12)

    # The new rows' K and V are given beside the pages, whose rows from the prefix on do not count.
    table = type(cache.table)(**vars(cache.table) | {"seq_lens": torch.tensor([total - new])})
    got = extend_attention(
        *(q, k[-new:].float(), v[-new:].float(), cache.kv, 1, table, torch.tensor([0, new])),
        sliding_window=sliding_window, **options,
    )  # fmt: skip
    assert_close(got, expected[0].numpy(), 1e-12)


def test_any_dtype_and_stride_of_sinks(rng, make_cache):
    cache = make_cache(Spec([70], 2, 64, 32))
    q = normal(rng, (1, 4, 64), torch.bfloat16)
    plan = DecodePlan(cache.kv, cache.table, num_q_heads=4)
    sinks = normal(rng, (8,), torch.bfloat16)[::2]
    expected = plan.run(q, 0, scale=0.1, sinks=sinks.float().contiguous())
    assert torch.equal(plan.run(q, 0, scale=0.1, sinks=sinks), expected)
    parameter = torch.nn.Parameter(sinks)
    assert torch.equal(plan.run(q, 0, scale=0.1, sinks=parameter), expected)


def test_refuses_sinks_that_do_not_fit(make_cache):
    cache = make_cache(Spec([40], 2, 64, 32))
    plan, q = DecodePlan(cache.kv, cache.table, num_q_heads=4), torch.zeros(1, 4, 64)
    with pytest.raises(ValueError, match=r"sinks are \[2\] on cpu; needs \[4\]"):
        plan.run(q, 0, scale=1.0, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match=r"sinks are \[4\] on meta"):
        plan.run(q, 0, scale=1.0, sinks=torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match=r"sinks are torch\.float64"):
        plan.run(q, 0, scale=1.0, sinks=torch.zeros(4, dtype=torch.float64))
    new = (torch.zeros(1, 2, 64), torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match=r"sinks are \[1\]"):
        extend_attention(
            *(q, *new, cache.kv, 0, cache.table, torch.tensor([0, 1])),
            scale=1.0, sinks=torch.zeros(1),
        )  # fmt: skip


def test_sinks_count_once_however_the_work_is_divided(rng, kernels):
    """One long request among short ones, on one thread and on several."""
    if kernels == "portable":
        pytest.skip("torch divides nothing")
    from hma_kernels import cpu

    cache = random_cache(rng, Spec([2500, 3, 40], 2, 64, 64))
    q, sinks = normal(rng, (3, 8, 64), torch.bfloat16), torch.full((8,), 9.0)
    expected = reference.decode_attention(
        *(q.double().numpy(), *cache.reference(0)), scale=0.1, sinks=sinks.double().numpy()
    )
    before = cpu.threads()
    try:
        for threads in (1, 2, 5):
            cpu.set_threads(threads)
            plan = DecodePlan(cache.kv, cache.table, num_q_heads=8)
            assert_close(plan.run(q, 0, scale=0.1, sinks=sinks), expected, 2e-5)
    finally:
        cpu.set_threads(before)
