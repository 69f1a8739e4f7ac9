"""The operations in torch, on any device: used where no kernel is."""

from hma_kernels.portable.attention import DecodePlan as decode_plan
from hma_kernels.portable.codec import pack, round_values, unpack, write_rows
from hma_kernels.portable.prefill import extend

__all__ = ["decode_plan", "extend", "pack", "round_values", "unpack", "write_rows"]
