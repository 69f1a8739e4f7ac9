"""Runs the Triton decode kernel's PTX, one warp after another, and compares with float64.

python test/gpu/run_ptx.py SEED DIM V_DIM GQA_GROUP_SIZE bfloat16|float16 CAP WINDOW
Not where TRITON_INTERPRET is set: kernels are compiled.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import triton.language as tl

sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from accuracy import assert_accurate
from kernel_cases import Cache, Spec, random_cache
from ptx_warp import Memory, Warp

from benchmark.kernels.triton_code import ATTENTION_TYPES, compile_for
from hma_kernels import reference
from hma_kernels.triton import decode

ITEMS = 2  # of each request


def attend(cache: Cache, query: torch.Tensor, window: int, cap: float) -> np.ndarray:
    """float64 [B, heads, v_head_dim], merged from the partial states that warps have written."""
    kv, table = cache.kv, cache.table
    batch, heads, dim = query.shape
    constants = decode.specialization(
        dim, kv.v_head_dim, kv.kv_heads, heads // kv.kv_heads, query.dtype
    )
    types = ATTENTION_TYPES | ({"query": "*fp16"} if query.dtype == torch.float16 else {})
    full = constants | {"CAPPED": cap > 0, "MMA": tl.bfloat16}
    compiled = compile_for(90, decode._partial, types, full, decode.OPTIONS)

    out = np.full((batch * ITEMS, heads, kv.v_head_dim), np.nan, np.float32)
    maxima, sums = (np.full((batch * ITEMS, heads), np.nan, np.float32) for _ in range(2))
    items = np.arange(batch * ITEMS, dtype=np.int32)
    layers = [layers[1].contiguous() for layers in vars(kv).values()]
    arguments = {
        **{"query": query, "partial_out": out, "partial_max": maxima, "partial_sum": sums},
        **dict(zip(("k_bfp8", "v_bfp8", "k_bf16", "v_bf16"), layers, strict=True)),
        **vars(table),
        "item_indptr": np.arange(batch + 1, dtype=np.int32) * np.int32(ITEMS),
        **{"item_request": items // np.int32(ITEMS), "batch_size": batch},
        **{"sliding_window": window, "scale": dim**-0.5, "logit_cap": cap},
        **{"query_stride": heads * dim, "query_head_stride": dim},
    }
    for name, layer in zip(("k_bfp8", "v_bfp8", "k_bf16", "v_bf16"), layers, strict=True):
        arguments[f"{name}_stride"] = layer.stride(0)
    memory, parameters = Memory(), []
    for name in decode._partial.arg_names:
        if name in full:
            continue
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            value = value.view(torch.uint8).numpy() if value.numel() else np.zeros(1, np.uint8)
        parameters.append(memory.place(value) if isinstance(value, np.ndarray) else value)
    warp = Warp(compiled.ptx, memory)
    head_blocks = -(-(heads // kv.kv_heads) // int(constants["HEADS"]))
    for item in items:
        for x in range(kv.kv_heads * head_blocks):
            warp.run(parameters, (x, int(item)))

    out, maxima, sums = (
        x.astype(np.float64).reshape(batch, ITEMS, *x.shape[1:]) for x in (out, maxima, sums)
    )
    top = maxima.max(1, keepdims=True)
    weights = np.exp2(maxima - np.where(np.isinf(top), 0, top))
    total = (weights * sums).sum(1)
    return (weights[..., None] * out).sum(1) / np.where(total == 0, 1, total)[..., None]


def main() -> None:
    seed, dim, v_dim, gqa_group_size = map(int, sys.argv[1:5])
    dtype, cap, window = getattr(torch, sys.argv[5]), float(sys.argv[6]), int(sys.argv[7])
    rng = np.random.default_rng(seed)
    cache = random_cache(rng, Spec([75, 0, 130], 2, dim, v_dim))
    query = torch.from_numpy(rng.standard_normal((3, 2 * gqa_group_size, dim))).to(dtype)
    got = attend(cache, query, window, cap)
    expected = reference.decode_attention(
        query.double().numpy(),
        *cache.reference(1),
        scale=dim**-0.5,
        logit_cap=cap,
        sliding_window=window,
    )
    assert_accurate(torch.from_numpy(got).float(), expected)
    print(f"largest error {np.abs(got - expected).max():.2g} of {np.abs(expected).max():.2g}")


if __name__ == "__main__":
    main()
