"""The operations in C++ for host tensors.

Instruction sets (AVX-512 with BF16, AVX-512, AVX2, scalar) are chosen at run time; HMA_CPU_ISA
names one. Threads are OMP_NUM_THREADS, else one a usable core. Importing this raises ImportError
where the extension was not built.
"""

from hma_kernels.cpu._ext import available_isas, hash, isa, set_isa, set_threads, threads
from hma_kernels.cpu.attention import DecodePlan as decode_plan
from hma_kernels.cpu.attention import extend
from hma_kernels.cpu.codec import pack, round_values, unpack, write_rows

__all__ = [
    "available_isas",
    "decode_plan",
    "extend",
    "hash",
    "isa",
    "pack",
    "round_values",
    "set_isa",
    "set_threads",
    "threads",
    "unpack",
    "write_rows",
]
