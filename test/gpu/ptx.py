"""The few PTX instructions of hma_kernels/triton/bytes.py, from the PTX ISA's description of them.

Registers are uint32 arrays, one element a lane.
"""

import re

import numpy as np
import torch

Register = np.ndarray


def run(source: str, outputs: int, inputs: list[Register]) -> list[Register]:
    """The registers $0..$(outputs-1) after inline assembly; its inputs are numbered from there."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    with np.errstate(over="ignore", invalid="ignore"):
        for line in re.findall(r"^\s*([a-z][\w.]* .*);$", source, re.MULTILINE):
            opcode, operands = line.split(" ", 1)
            to, *rest = operands.split(", ")
            registers[to] = OPCODES[opcode](*(_value(each, registers) for each in rest))
    return [registers[f"${i}"] for i in range(outputs)]


def _value(operand: str, registers: dict[str, Register]) -> Register:
    return registers[operand] if operand in registers else np.uint32(int(operand, 0))


def _permute(a: Register, b: Register, selector: Register) -> Register:
    """prmt: of 8 bytes, b's above a's, four are chosen; the fourth bit asks for the sign only."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    result = np.zeros(a.shape, np.uint32)
    for i in range(4):
        choice = selector >> np.uint32(4 * i) & np.uint32(0xF)
        word = np.where(choice & 4, b, a)
        byte = word >> (choice & np.uint32(3)) * np.uint32(8) & np.uint32(0xFF)
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        result |= np.where(choice & 8, sign, byte) << np.uint32(8 * i)
    return result


def halves(register: Register) -> np.ndarray:
    """float32 [..., 2] of bfloat16 pairs, the lower half first."""
    pairs = np.stack([register << np.uint32(16), register & np.uint32(0xFFFF0000)], -1)
    return pairs.astype(np.uint32).view(np.float32)


def pack(values: np.ndarray) -> Register:
    """bfloat16 pairs, rounded to nearest even; subnormals are kept."""
    rounded = torch.from_numpy(values).float().bfloat16()
    bits = rounded.view(torch.uint16).numpy().astype(np.uint32)
    return bits[..., 0] | bits[..., 1] << np.uint32(16)


def _fma(a: Register, b: Register, c: Register) -> Register:
    # A product of bfloat16 numbers is exact in float64, and so is the addition of a zero.
    return pack(halves(a).astype(np.float64) * halves(b) + halves(c))


OPCODES = {
    "mov.b32": lambda a: a,
    "prmt.b32": _permute,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "fma.rn.bf16x2": _fma,
}
