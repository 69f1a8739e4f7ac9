"""Triton kernels compiled for GPUs that need not be there."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmark.kernels.machine_code import Instruction, disassemble
from hma_kernels.triton import decode

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
ATTENTION_TYPES = {
    **{"query": "*bf16", "key": "*bf16", "value": "*bf16", "out": "*bf16"},
    **{"partial_out": "*fp32", "partial_max": "*fp32", "partial_sum": "*fp32"},
    **{"k_bfp8": "*u8", "v_bfp8": "*u8", "k_bf16": "*bf16", "v_bf16": "*bf16"},
    **{"scale": "fp32", "logit_cap": "fp32", "item_indptr": "*i32", "item_request": "*i32"},
    **{"sinks": "*fp32"},
}


@dataclass(frozen=True)
class Compiled:
    """One kernel's PTX and machine code; registers of a thread; bytes spilled, and in shared
    memory."""

    ptx: str
    code: list[Instruction]
    registers: int
    spilled: int
    shared: int

    def __str__(self) -> str:
        # ptxas pads the code with NOPs.
        instructions = sum(each.name != "NOP" for each in self.code)
        return (
            f"{self.registers} registers, {self.spilled} bytes spilled, {instructions} "
            f"instructions, {self.shared} bytes of shared memory"
        )


def compile_for(
    architecture: int,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
) -> Compiled:
    """Pointers and strides count as aligned, as they are. Raises what Triton and ptxas raise.

    types: of arguments, where their names do not say it. options: num_warps and the like.
    """
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else _type_of(name, types) for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    made = compile_kernel(source, target=target, options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        functions = disassemble(knobs.nvidia.cuobjdump.path, Path(file.name))
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", answer)}
    return Compiled(
        made.asm["ptx"],
        functions[kernel.__name__],
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        made.metadata.shared,
    )


def decode_kernel(
    architecture: int,
    head_dim: int,
    gqa_group_size: int,
    dtype: torch.dtype = torch.bfloat16,
    capped: bool = False,
) -> Compiled:
    """The decode kernel for 8 KV heads, K and V of head_dim and queries of dtype."""
    constants = decode.specialization(head_dim, head_dim, 8, gqa_group_size, dtype)
    return compile_for(
        architecture,
        decode._partial,
        ATTENTION_TYPES | ({"query": "*fp16"} if dtype == torch.float16 else {}),
        constants | {"CAPPED": capped, "MMA": tl.bfloat16},
        decode.OPTIONS,
    )


def _type_of(name: str, types: Mapping[str, str]) -> str:
    return types.get(name) or ("*i64" if name.startswith(INT64S) else "i32")
