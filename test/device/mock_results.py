"""What each operation gives back and how many programs it needs: of real ttnn on a described card,
or of whatever else is imported as ttnn. Prints a line of JSON for each operation."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

PLACES = ("L1", "DRAM")


def calls(ttnn: Any, device: Any, place: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Operations on operands that lie in `place`, weights and pages in DRAM as on a server."""
    memory = {"L1": ttnn.L1_MEMORY_CONFIG, "DRAM": ttnn.DRAM_MEMORY_CONFIG}
    bf16, bfp8, tile, row = (
        *(ttnn.bfloat16, ttnn.bfloat8_b, ttnn.TILE_LAYOUT, ttnn.ROW_MAJOR_LAYOUT),
    )

    def tensor(*shape: int, dtype: Any = bf16, layout: Any = tile, where: str = place) -> Any:
        values = torch.float32 if dtype in (bf16, bfp8, ttnn.float32) else torch.int32
        return ttnn.from_torch(
            torch.zeros(shape, dtype=values),
            dtype=dtype,
            layout=layout,
            device=device,
            memory_config=memory[where],
        )

    def fixed(*shape: int, dtype: Any = bf16, layout: Any = tile) -> Any:
        return tensor(*shape, dtype=dtype, layout=layout, where="DRAM")

    x, weight, norm = tensor(1, 1, 64, 256), fixed(256, 512, dtype=bfp8), fixed(1, 1, 1, 256)
    qkv, q = tensor(1, 1, 64, 512), tensor(1, 4, 64, 64)
    cos, ids = tensor(1, 1, 64, 64), tensor(1, 64, dtype=ttnn.uint32, layout=row)
    table, pages = fixed(512, 256, layout=row), fixed(20, 2, 32, 64, dtype=bfp8)
    k8 = tensor(1, 2, 64, 64, dtype=bfp8)
    fill = fixed(1, 2, dtype=ttnn.int32, layout=row)
    seen = fixed(1, 8, dtype=ttnn.int32, layout=row)
    start = fixed(1, dtype=ttnn.int32, layout=row)
    attention = ttnn.SDPAProgramConfig(
        compute_with_storage_grid_size=device.compute_with_storage_grid_size(),
        q_chunk_size=32,
        k_chunk_size=32,
        exp_approx_mode=False,
    )
    silu = [ttnn.UnaryOpType.SILU]
    more, heads = ttnn.experimental, {"num_heads": 4, "num_kv_heads": 2}
    l1 = ttnn.L1_MEMORY_CONFIG
    yield "embedding", lambda: ttnn.embedding(ids, table, layout=tile, dtype=bf16)
    yield "reshape, a view", lambda: ttnn.reshape(x, (1, 2, 32, 256))
    yield "reshape", lambda: ttnn.reshape(x, (1, 1, 128, 128))
    yield "rms_norm", lambda: ttnn.rms_norm(x, epsilon=1e-6, weight=norm)
    yield "linear", lambda: ttnn.linear(x, weight, dtype=bf16)
    yield "linear to L1", lambda: ttnn.linear(x, weight, dtype=bfp8, memory_config=l1)
    yield "heads", lambda: more.nlp_create_qkv_heads(qkv, transpose_k_heads=False, **heads)
    yield "rotation", lambda: more.rotary_embedding_hf(q, cos, cos, is_decode_mode=False)
    yield "typecast", lambda: ttnn.typecast(x, bfp8)
    yield "fill", lambda: more.paged_fill_cache(pages, k8, fill, batch_idx=0)
    yield (
        "attention",
        lambda: ttnn.transformer.chunked_scaled_dot_product_attention(
            *(q, pages, pages, seen),
            chunk_start_idx_tensor=start,
            scale=0.125,
            program_config=attention,
        ),
    )
    yield "concat_heads", lambda: more.nlp_concat_heads(q)
    yield "add", lambda: ttnn.add(x, x)
    yield "mul", lambda: ttnn.mul(x, x, input_tensor_a_activations=silu)
    yield "slice", lambda: ttnn.slice(x, [0, 0, 0, 0], [1, 1, 32, 256])
    yield "slice elsewhere", lambda: ttnn.slice(x, [0, 0, 32, 0], [1, 1, 64, 256])
    yield "concat", lambda: ttnn.concat([x, x], 2)
    yield "to_layout", lambda: ttnn.to_layout(x, row)
    yield "to_layout, the same", lambda: ttnn.to_layout(x, tile)
    yield "slice, all of it", lambda: ttnn.slice(x, [0, 0, 0, 0], [1, 1, 64, 256])
    yield "typecast, the same", lambda: ttnn.typecast(x, bf16)
    yield "softmax", lambda: ttnn.softmax(x, dim=-1)
    yield "residual in norm", lambda: ttnn.rms_norm(x, residual_input_tensor=x, weight=norm)
    wide, mask = tensor(1, 1, 64, 128, dtype=ttnn.float32), tensor(1, 1, 64, 128)
    few, ones = tensor(1, 1, 64, 8, dtype=ttnn.uint16), tensor(1, 1, 64, 8)
    options = {"dim": -1, "largest": True, "sorted": True, "stable": True}
    yield "lt", lambda: ttnn.lt(wide, wide, dtype=bf16)
    yield "ge", lambda: ttnn.ge(wide, wide, dtype=bf16)
    yield "topk", lambda: ttnn.topk(wide, 8, **options)
    yield "topk of BF16", lambda: ttnn.topk(mask, 8, **options)
    yield "scatter", lambda: ttnn.scatter(mask, -1, few, ones)
    yield "where", lambda: ttnn.where(wide, wide, -1e4)


def last(value: Any) -> str:
    """Of an enumeration's name, as both sides have it."""
    return str(value).rpartition(".")[2].lower().removesuffix("_layout")


def results(ttnn: Any, device: Any) -> list[Any]:
    found = []
    for place in PLACES:
        for name, run in calls(ttnn, device, place):
            before = device.num_program_cache_entries()
            out = run()
            outs = out if isinstance(out, list | tuple) else () if out is None else (out,)
            programs = device.num_program_cache_entries() - before
            looks = [
                [
                    list(each.shape),
                    last(each.dtype),
                    last(each.layout),
                    last(each.memory_config().buffer_type),
                ]
                for each in outs
            ]
            found.append([f"{name}, operands in {place}", looks, programs])
    return found


if __name__ == "__main__":
    import ttnn

    from sglang_hma.prefill.ttnn.card import opened

    with opened() as card:
        for line in results(ttnn, card.device):
            print(json.dumps(line))
