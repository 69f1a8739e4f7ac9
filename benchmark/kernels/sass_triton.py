"""Warp instructions that the Triton decode kernel executes for a BFP8 page, counted in its machine
code; needs no GPU.

A page is 32 tokens of one KV head, K and V, with up to 8 of its query heads. Counted is the
shortest way around the kernel's loop that multiplies a whole page, and that is all of it: the page
is looked up, its tokens are compared with what the request sees, and what has been added up so far
is scaled, in every round. What stands outside the loop (queries are loaded, the state is stored) is
not counted, nor the loop over BF16 pages.
"""

from typing import Any

import torch
import triton

from benchmark.kernels.machine_code import Flow
from benchmark.kernels.page_cost import WARP_SIZE, counted, report
from benchmark.kernels.triton_code import decode_kernel
from hma_kernels.layout import PAGE, TILE
from hma_kernels.triton import decode

BAR = 1150
M, N, K = 16, 8, 16  # of a tensor core operation


def work_of_a_page(architecture: int, head_dim: int, heads: int) -> dict[str, int]:
    """How many instructions of these names a BFP8 page needs, whatever the compiler does.

    heads: of one program; products have two columns a head. Multiplications of bfloat16 pairs, one
    for two bytes and for two weights in each tile of V, are only in the loop over BFP8 pages.
    """
    tiles, columns = 2 * head_dim // TILE, 2 * heads
    products = (TILE // M) * (PAGE // K) * (columns // N)
    pairs = tiles * TILE * PAGE + tiles // 2 * PAGE * columns
    multiply = "HMUL2" if architecture >= 90 else "HFMA2"
    return {"HMMA": tiles * products, multiply: pairs // 2 // WARP_SIZE}


def count(architecture: int, head_dim: int, gqa_group_size: int) -> dict[str, Any]:
    """Instructions a page, as page_cost.counted, and what a thread takes."""
    compiled = decode_kernel(architecture, head_dim, gqa_group_size)
    heads = decode.heads_of_program(head_dim, head_dim, gqa_group_size, torch.bfloat16)
    work = work_of_a_page(architecture, head_dim, heads)
    return counted(Flow(compiled.code).shortest_loop(work)) | {
        "registers": compiled.registers,
        "spilled": compiled.spilled,
        "triton": triton.__version__,
    }


if __name__ == "__main__":
    report(__doc__ or "", BAR, count)
