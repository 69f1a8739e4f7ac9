"""BFP8 bytes as numbers, each in two spellings that mean the same.

On a GPU numbers are bfloat16, and PTX works on four bytes at a time. Triton's interpreter knows no
PTX and no products of bfloat16: there numbers are float32.

A data byte is a sign and a 7-bit magnitude q; with its group's exponent E it stands for
+-(q * 2^-6) * 2^(E-127). `widen` makes the first factor, `scale_of` and `scaled` the second.
"""

import triton
import triton.language as tl

# With its sign above it, q is the bfloat16 subnormal +-q * 2^-133. Times 2^127 it is normal, so
# that it does not matter what tensor cores make of subnormals. -0 added keeps the sign of a zero.
WIDEN = tl.constexpr("""
{
.reg .b32 low, high, unit, none;
mov.b32 unit, 0x7F007F00;
mov.b32 none, 0x80008000;
prmt.b32 low, $2, 0, 0x9180;
prmt.b32 high, $2, 0, 0xB3A2;
and.b32 low, low, 0x807F807F;
and.b32 high, high, 0x807F807F;
fma.rn.bf16x2 $0, low, unit, none;
fma.rn.bf16x2 $1, high, unit, none;
}
""")

WIDEN_PAIRS = tl.constexpr("""
{
.reg .b32 x<4>, unit, none;
mov.b32 unit, 0x7F007F00;
mov.b32 none, 0x80008000;
prmt.b32 x0, $4, $5, 0xC480;
prmt.b32 x1, $4, $5, 0xD591;
prmt.b32 x2, $4, $5, 0xE6A2;
prmt.b32 x3, $4, $5, 0xF7B3;
and.b32 x0, x0, 0x807F807F;
and.b32 x1, x1, 0x807F807F;
and.b32 x2, x2, 0x807F807F;
and.b32 x3, x3, 0x807F807F;
fma.rn.bf16x2 $0, x0, unit, none;
fma.rn.bf16x2 $1, x1, unit, none;
fma.rn.bf16x2 $2, x2, unit, none;
fma.rn.bf16x2 $3, x3, unit, none;
}
""")

# E is moved to where bfloat16 has its exponent.
SCALED = tl.constexpr("""
{
.reg .b32 seen, low, high, none;
mov.b32 none, 0x80008000;
and.b32 seen, $4, $5;
prmt.b32 low, seen, 0, 0x4140;
prmt.b32 high, seen, 0, 0x4342;
shl.b32 low, low, 7;
shl.b32 high, high, 7;
fma.rn.bf16x2 $0, $2, low, none;
fma.rn.bf16x2 $1, $3, high, none;
}
""")


@triton.jit
def _widen_float32(byte):
    magnitude = (byte & 0x7F).to(tl.float32) * 0.015625
    return tl.where(byte >= 128, -magnitude, magnitude)


@triton.jit
def widen(byte, MMA: tl.constexpr):
    """Data bytes as MMA, +-q * 2^-6, of the same shape; the last dimension has four neighbours."""
    if tl.float32 == MMA:
        return _widen_float32(byte)
    else:
        return tl.inline_asm_elementwise(
            WIDEN, "=r,=r,r", [byte], tl.bfloat16, is_pure=True, pack=4
        )


@triton.jit
def widen_pairs(first, second, MMA: tl.constexpr):
    """As tl.join(widen(first), widen(second)), two to a register. [..., 4] twice -> [..., 4, 2]."""
    if tl.float32 == MMA:
        return tl.join(_widen_float32(first), _widen_float32(second))
    else:
        # Not pure, or Triton would exchange bytes between registers before and not after it.
        both = tl.inline_asm_elementwise(
            WIDEN_PAIRS, "=r,=r,=r,=r,r,r", [first, second], tl.int32, is_pure=False, pack=4
        )
        low = both.to(tl.int16).to(tl.bfloat16, bitcast=True)
        return tl.join(low, (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))


@triton.jit
def scale_of(exponent):
    """float32 2^(E-127): zero at E = 0, infinity at E = 255."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled(weight, exponent, seen, MMA: tl.constexpr):
    """Weights (MMA) times scale_of their exponents, as MMA; the last dimension has four neighbours.

    seen: uint8 255, or 0 where E is to count as 0, whatever it is.
    """
    if tl.float32 == MMA:
        return weight * scale_of(exponent & seen)
    else:
        return tl.inline_asm_elementwise(
            *(SCALED, "=r,=r,r,r,r,r", [weight, exponent, seen], tl.bfloat16),
            is_pure=True,
            pack=4,
        )
