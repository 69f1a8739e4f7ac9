"""Compiles every Triton kernel for GPUs that need not be there; prints what each takes.

python test/gpu/compile_kernels.py [80 89 90]
"""

import sys

import torch
import triton.language as tl

from benchmark.kernels.triton_code import ATTENTION_TYPES, compile_for, decode_kernel
from hma_kernels.triton import (
    codec,
    landing,
    merge,
    page_table,
    prefill,
    prefix,
    schedule,
    store,
    visible,
    xxh3,
)

CODEC_TYPES = {"x": "*bf16", "tiles": "*u8", "out": "*u8", "page_ids": "*i64", "page_rows": "*i64"}
PACK = {"PADDED_HEIGHT": 32, "WIDTH": 128, "TILES": 4, "COLUMNS": 128, "HOST": False}
TABLE_TYPES = {"req_to_token": "*i32", "slab_is_bf16": "*i1"}
TABLE_TYPES |= {"table_seq_lens": "*i64", "page_counts": "*i64"}
HASH_TYPES = {"addresses": "*i64", "keys": "*u64", "start": "*u64", "out": "*u64"}
KERNELS = [
    (schedule._divide, ATTENTION_TYPES, {"BATCH_PADDED": 64, "BLOCK": schedule.BLOCK}),
    (page_table._count, TABLE_TYPES, {"BLOCK": page_table.BLOCK}),
    (page_table._place, TABLE_TYPES, {"BLOCK": page_table.BLOCK, "BATCH_PADDED": 64}),
    (visible._count, TABLE_TYPES, {"BLOCK": visible.BLOCK}),
    (visible._keep, TABLE_TYPES, {"BLOCK": visible.BLOCK, "BATCH_PADDED": 64}),
    (
        store._store,
        {"slots": "*i64", "k": "*bf16", "v": "*bf16", "k_pages": "*bf16", "v_pages": "*bf16"},
        {"HEADS": 8, "DIM": 128, "V_DIM": 128, "DIM_PADDED": 128, "V_PADDED": 128},
    ),
    (
        merge._merge,
        ATTENTION_TYPES,
        {
            **{"HEADS": 32, "V_DIM": 128, "V_PADDED": 128, "SINKS": True},
            **{"ITEMS_PER_STEP": merge.ITEMS_PER_STEP},
        },
    ),
    (
        prefill._extend,
        ATTENTION_TYPES | {"prefix_key": "*bf16", "prefix_value": "*bf16"},
        {
            **{"HEADS": 32, "GQA_GROUP_SIZE": 4, "DIM": 128, "V_DIM": 128, "DIM_PADDED": 128},
            **{"V_PADDED": 128, "ROWS": prefill.ROWS_PER_BLOCK, "KEYS": prefill.KEYS_PER_STEP},
            **{"SPLIT_Q": False, "CAPPED": False, "SINKS": True, "MMA": tl.bfloat16},
        },
    ),
    *(
        (
            prefix._gather,
            {"pages": pages, "indices": "*i64", "first_row": "*i64", "out": "*bf16"},
            {"HEADS": 8, "DIM": 128, "DIM_PADDED": 128, "BFP8": pages == "*u8"},
        )
        for pages in ("*u8", "*bf16")
    ),
    (codec._pack_rows, CODEC_TYPES, PACK | {"SCATTER": True}),
    (codec._unpack_rows, CODEC_TYPES | {"out": "*bf16"}, {"WIDTH": 128, "COLUMNS": 128}),
    (
        landing._unpack_page,
        {"packed": "*i64", "plain": "*i64", "source_offset": "i64", "target_offset": "i64"},
        {"STRIP_BYTES": 4 * 1088, "DIM": 128, "DIM_PADDED": 128},
    ),
    (xxh3._accumulate, HASH_TYPES, {"LENGTH": 34816, "BLOCKS": xxh3.BLOCKS_PER_WARP}),
]
# Instances of the decode kernel: head dim, query heads of a KV head, type of queries, capped.
DECODE = [
    (96, 4, torch.float16, True),
    (128, 4, torch.bfloat16, False),
    (128, 8, torch.bfloat16, True),
    (256, 8, torch.float16, True),
]


def main(architectures: list[int]) -> None:
    for architecture in architectures:
        for dim, size, dtype, capped in DECODE:
            compiled = decode_kernel(architecture, dim, size, dtype, capped)
            print(f"sm_{architecture} decode({dim=}, gqa_group_size={size}, {dtype}): {compiled}")
        for kernel, types, constants in KERNELS:
            compiled = compile_for(architecture, kernel, types, constants, {})
            print(f"sm_{architecture} {kernel.__name__}: {compiled}")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [80, 89, 90])
