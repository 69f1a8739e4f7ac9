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

from hma_kernels.triton import codec, decode, merge, page_table, prefill, schedule, store, xxh3

INT64S = ("ids", "pos", "start", "seq_lens", "rows", "lengths", "counts")
TYPES = {
    **{"query": "*bf16", "out": "*fp32", "partial": "*fp32", "maxima": "*fp32", "sums": "*fp32"},
    **{"k8": "*u8", "v8": "*u8", "k16": "*bf16", "v16": "*bf16"},
    **{"scale": "fp32", "logit_cap": "fp32", "item_start": "*i32", "item_request": "*i32"},
}
EXTEND_TYPES = TYPES | {"key": "*bf16", "value": "*bf16", "out": "*bf16", "prefix_lens": "*i64"}
EXTEND_TYPES |= {"row_start": "*i64", "block_request": "*i64", "block_first": "*i64"}
CODEC_TYPES = {"x": "*bf16", "tiles": "*u8", "out": "*u8", "page_ids": "*i64", "page_rows": "*i64"}
ENCODE = {"PADDED_HEIGHT": 32, "WIDTH": 128, "TILES": 4, "COLUMNS": 128, "HOST": False}
TABLE_TYPES = {"req_to_token": "*i32", "slab_is_bf16": "*i1"}
TABLES = {"PAGE": 32, "SLAB": 32, "BLOCK": page_table.BLOCK}
HASH_TYPES = {"addresses": "*i64", "keys": "*u64", "start": "*u64", "out": "*u64"}


def heads(dim: int, grouped: int) -> dict[str, Any]:
    padded = 1 << (dim - 1).bit_length()
    shape = {"KV_HEADS": 8, "GROUPED": grouped, "DIM": dim, "V_DIM": dim}
    padding = {"DIM_PADDED": padded, "V_PADDED": padded, "ROWS": max(16, grouped)}
    return shape | padding | {"PAGES": decode.PAGES_A_TILE, "MMA": tl.bfloat16}


KERNELS = [
    *(
        (decode._partial, TYPES, heads(dim, grouped) | {"SPLIT_Q": split, "CAPPED": split})
        for dim, grouped, split in ((96, 4, True), (128, 4, False))
    ),
    (schedule._cut, TYPES, {"BATCH": 64, "BLOCK": 128}),
    (page_table._count, TABLE_TYPES, TABLES),
    (page_table._place, TABLE_TYPES, TABLES | {"BATCH": 64}),
    (
        store._store,
        {"slots": "*i64", "k": "*bf16", "v": "*bf16", "k_pages": "*bf16", "v_pages": "*bf16"},
        {
            **{"HEADS": 8, "DIM": 128, "V_DIM": 128, "DIM_PADDED": 128, "V_PADDED": 128},
            **{"PAGE": 32},
        },
    ),
    (merge._merge, TYPES, {"HEADS": 32, "V_DIM": 128, "V_PADDED": 128, "ITEMS": 16}),
    (
        prefill._extend,
        EXTEND_TYPES,
        {
            **{k: v for k, v in heads(128, 4).items() if k != "KV_HEADS"},
            **{"HEADS": 32, "ROWS": prefill.ROWS, "SPLIT_Q": False, "CAPPED": False},
        },
    ),
    (codec._encode_rows, CODEC_TYPES, ENCODE | {"SCATTER": True}),
    (codec._decode_rows, CODEC_TYPES | {"out": "*bf16"}, {"WIDTH": 128, "COLUMNS": 128}),
    (xxh3._accumulate, HASH_TYPES, {"LENGTH": 34816, "BLOCKS": xxh3.BLOCKS_A_WARP}),
]


def type_of(name: str, types: dict[str, str]) -> str:
    return types.get(name) or ("*i64" if name.startswith(INT64S) else "i32")


def resources(cubin: bytes) -> str:
    """Registers and spilled bytes of a thread, shared memory of a block, instructions."""

    def ask(option: str) -> str:
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", ask("-res-usage")))
        # Beside an offset stands an instruction; the padding behind the last one is no work.
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", ask("-sass"), re.MULTILINE)
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
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
                if signature[name].startswith("*") or name.endswith(("_page", "_stride"))
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
