"""Compiles every Triton kernel for GPUs that need not be there; prints what each takes.

python test/gpu/compile_kernels.py [80 89 90]
"""

import re
import subprocess
import sys
import tempfile
from typing import Any

import triton.language as tl
from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hma_kernels.triton import (
    codec,
    decode,
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

INT64S = (
    "bfp8_",
    "bf16_",
    "kept_",
    "q_indptr",
    "block_",
    "rows",
    "seq_lens",
    "prefix_lens",
    "prefix_starts",
)
TYPES = {
    **{"query": "*bf16", "key": "*bf16", "value": "*bf16", "out": "*bf16"},
    **{"partial_out": "*fp32", "partial_max": "*fp32", "partial_sum": "*fp32"},
    **{"k_bfp8": "*u8", "v_bfp8": "*u8", "k_bf16": "*bf16", "v_bf16": "*bf16"},
    **{"scale": "fp32", "logit_cap": "fp32", "item_indptr": "*i32", "item_request": "*i32"},
}
CODEC_TYPES = {"x": "*bf16", "tiles": "*u8", "out": "*u8", "page_ids": "*i64", "page_rows": "*i64"}
PACK = {"PADDED_HEIGHT": 32, "WIDTH": 128, "TILES": 4, "COLUMNS": 128, "HOST": False}
TABLE_TYPES = {"req_to_token": "*i32", "slab_is_bf16": "*i1"}
TABLE_TYPES |= {"table_seq_lens": "*i64", "page_counts": "*i64"}
HASH_TYPES = {"addresses": "*i64", "keys": "*u64", "start": "*u64", "out": "*u64"}


def heads(dim: int, gqa_group_size: int) -> dict[str, Any]:
    padded = 1 << (dim - 1).bit_length()
    shape = {"KV_HEADS": 8, "GQA_GROUP_SIZE": gqa_group_size, "DIM": dim, "V_DIM": dim}
    padding = {"DIM_PADDED": padded, "V_PADDED": padded, "ROWS": max(16, gqa_group_size)}
    return shape | padding | {"PAGES_PER_TILE": decode.PAGES_PER_TILE, "MMA": tl.bfloat16}


KERNELS = [
    *(
        (decode._partial, TYPES, heads(dim, size) | {"SPLIT_Q": split, "CAPPED": split})
        for dim, size, split in ((96, 4, True), (128, 4, False))
    ),
    (schedule._divide, TYPES, {"BATCH_PADDED": 64, "BLOCK": schedule.BLOCK}),
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
        TYPES,
        {"HEADS": 32, "V_DIM": 128, "V_PADDED": 128, "ITEMS_PER_STEP": merge.ITEMS_PER_STEP},
    ),
    (
        prefill._extend,
        TYPES | {"prefix_key": "*bf16", "prefix_value": "*bf16"},
        {
            **{"HEADS": 32, "GQA_GROUP_SIZE": 4, "DIM": 128, "V_DIM": 128, "DIM_PADDED": 128},
            **{"V_PADDED": 128, "ROWS": prefill.ROWS_PER_BLOCK, "KEYS": prefill.KEYS_PER_STEP},
            **{"SPLIT_Q": False, "CAPPED": False, "MMA": tl.bfloat16},
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


def type_of(name: str, types: dict[str, str]) -> str:
    return types.get(name) or ("*i64" if name.startswith(INT64S) else "i32")


def resources(cubin: bytes) -> str:
    """Registers and spilled bytes of a thread, and the number of instructions."""

    def ask(option: str) -> str:
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", ask("-res-usage")))
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", ask("-sass"), re.MULTILINE)
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    # ptxas pads the code with NOPs.
    instructions = sum(not line.startswith("NOP") for line in lines)
    return f"{usage['REG']} registers, {spilled} bytes spilled, {instructions} instructions"


def main(architectures: list[int]) -> None:
    for architecture in architectures:
        for kernel, types, constants in KERNELS:
            names = kernel.arg_names
            signature = {n: "constexpr" if n in constants else type_of(n, types) for n in names}
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if signature[name].startswith("*") or name.endswith("_stride")
            }
            values = {(names.index(name),): value for name, value in constants.items()}
            source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
            made = compile_kernel(source, target=GPUTarget("cuda", architecture, 32))
            shape = ", ".join(f"{k}={v}" for k, v in constants.items() if k in ("DIM", "SPLIT_Q"))
            print(
                f"sm_{architecture} {kernel.__name__}({shape}): {resources(made.asm['cubin'])}, "
                f"{made.metadata.shared} bytes of shared memory"
            )


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [80, 89, 90])
