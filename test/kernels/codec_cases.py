"""Floats of every kind, as the codec may be given them."""

import numpy as np
import torch

ROUNDINGS = ["device", "host"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def wide_floats(rng, shape):
    """Exponents near each other in a group, far apart between groups; specials sprinkled in."""
    rows = rng.integers(-150, 128, (*shape[:-1], 1)) + rng.integers(-12, 1, shape)
    x = np.ldexp(rng.uniform(-2, 2, shape), rows).astype(np.float32)
    specials = np.array([0, 1 << 31, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFF810000])
    picked = rng.choice(specials, shape).astype(np.uint32).view(np.float32)
    return np.where(rng.random(shape) < rng.choice([0, 0.02]), picked, x)


def random_bits(rng, shape):
    return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)


def source(seed, shape, dtype):
    rng = np.random.default_rng(seed)
    make = wide_floats if rng.random() < 0.7 else random_bits
    with np.errstate(over="ignore"):
        x = torch.from_numpy(make(rng, shape)).to(dtype)
    # Which float32 NaN a float16 NaN becomes depends on the instruction that torch happens to use.
    return torch.where(x.isnan(), torch.inf, x) if dtype == torch.float16 else x


def same_bits(a, b):
    assert a.dtype == b.dtype
    return torch.equal(a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype]))
