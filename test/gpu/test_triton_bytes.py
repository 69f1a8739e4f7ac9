"""Both spellings of hma_kernels/triton/bytes.py against the format's definition: the one that runs
here (PTX on a GPU, arithmetic under the interpreter), and the PTX, emulated."""

import numpy as np
import ptx
import pytest
import torch
import triton
import triton.language as tl

from hma_kernels.triton import bytes as kernels
from hma_kernels.triton.softmax import mma_type

BYTES = np.arange(256, dtype=np.uint8)
WIDENED = np.where(BYTES < 128, 1.0, -1.0) * (BYTES & 0x7F) / 64
# 2^(E-127): nothing at E = 0, infinity at E = 255.
SCALES = np.where(BYTES > 0, 2.0 ** (BYTES.astype(float) - 127), 0)
SCALES[255] = np.inf


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    """Equal, a zero's sign included."""
    return np.array_equal(got, expected) and np.array_equal(np.signbit(got), np.signbit(expected))


def words(values: np.ndarray) -> np.ndarray:
    """Four neighbouring bytes a register."""
    return np.ascontiguousarray(values, np.uint8).view(np.uint32)


def weights_and_exponents(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bfloat16 numbers as float64 [1024], some of them 1 or 0; each exponent four times; seen."""
    weights = torch.from_numpy(2.0 ** rng.uniform(-140, 0, 1024)).bfloat16().double().numpy()
    weights[::7], weights[::11] = 0, 1
    seen = np.where(rng.random(1024) < 0.7, 255, 0).astype(np.uint8)
    weights[seen == 0] = 0
    return weights, rng.permutation(np.repeat(BYTES, 4)), seen


def assert_scaled(
    got: np.ndarray, weights: np.ndarray, exponents: np.ndarray, seen: np.ndarray
) -> None:
    assert not got[seen == 0].any()
    weights, scales, got = (x[seen == 255] for x in (weights, SCALES[exponents], got))
    infinite = np.isinf(scales)
    assert not np.isfinite(got[infinite]).any() and infinite.any()
    expected = weights[~infinite] * scales[~infinite]
    # Half a unit of bfloat16, or of its smallest number.
    assert (np.abs(got[~infinite] - expected) <= np.maximum(expected * 2.0**-8, 2.0**-134)).all()


@triton.jit
def _widen(data, out, N: tl.constexpr, MMA: tl.constexpr):
    at = tl.arange(0, N)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out + at, kernels.widen(tl.load(data + at), MMA).to(tl.float32))


@triton.jit
def _widen_pairs(first, second, out, N: tl.constexpr, MMA: tl.constexpr):
    at = tl.arange(0, N)[:, None] * 4 + tl.arange(0, 4)[None, :]
    pairs = kernels.widen_pairs(tl.load(first + at), tl.load(second + at), MMA)
    at = at[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(out + at, pairs.to(tl.float32))


@triton.jit
def _scaled(weights, exponents, seen, out, scales, N: tl.constexpr, MMA: tl.constexpr):
    at = tl.arange(0, N)[:, None] * 4 + tl.arange(0, 4)[None, :]
    exponent = tl.load(exponents + at)
    weight = tl.load(weights + at).to(MMA)
    tl.store(out + at, kernels.scaled(weight, exponent, tl.load(seen + at), MMA).to(tl.float32))
    tl.store(scales + at, kernels.scale_of(exponent))


def test_what_runs_here(rng: np.random.Generator, device: torch.device) -> None:
    mma = mma_type(device)
    data, other = (torch.from_numpy(rng.permutation(BYTES)).to(device) for _ in range(2))
    out = torch.empty(256, device=device)
    _widen[(1,)](data, out, 64, mma, num_warps=1)
    assert same(out.cpu().numpy(), WIDENED[data.cpu()])

    pairs = torch.empty((256, 2), device=device)
    _widen_pairs[(1,)](data, other, pairs, 64, mma, num_warps=1)
    assert same(pairs.cpu().numpy(), WIDENED[torch.stack([data, other], -1).cpu()])

    weights, exponents, seen = weights_and_exponents(rng)
    out, scales = torch.empty(1024, device=device), torch.empty(1024, device=device)
    given = torch.from_numpy(weights).float(), *map(torch.from_numpy, (exponents, seen))
    _scaled[(1,)](*(x.to(device) for x in given), out, scales, 256, mma, num_warps=1)
    assert_scaled(out.cpu().double().numpy(), weights, exponents, seen)
    assert same(scales.cpu().double().numpy(), SCALES[exponents])


def test_ptx_widens_every_byte(rng: np.random.Generator) -> None:
    data, other = rng.permutation(BYTES), rng.permutation(BYTES)
    got = ptx.run(kernels.WIDEN.value, 2, [words(data)])
    assert same(np.concatenate([ptx.halves(each) for each in got], -1).ravel(), WIDENED[data])

    got = ptx.run(kernels.WIDEN_PAIRS.value, 4, [words(data), words(other)])
    pairs = np.stack([ptx.halves(each) for each in got], 1).reshape(256, 2)
    assert same(pairs, WIDENED[np.stack([data, other], -1)])


def test_ptx_scales_weights(rng: np.random.Generator) -> None:
    weights, exponents, seen = weights_and_exponents(rng)
    pairs = ptx.pack(weights.reshape(256, 2, 2))
    got = ptx.run(
        kernels.SCALED.value, 2, [pairs[:, 0], pairs[:, 1], words(exponents), words(seen)]
    )
    got = np.stack([ptx.halves(each) for each in got], 1).ravel()
    assert_scaled(got.astype(np.float64), weights, exponents, seen)


@pytest.mark.parametrize("source", ["WIDEN", "WIDEN_PAIRS", "SCALED"])
def test_a_changed_selector_is_noticed(rng: np.random.Generator, source: str) -> None:
    """What the emulation is worth: swapped bytes give other numbers."""
    assembly = getattr(kernels, source).value
    outputs, inputs = {"WIDEN": (2, 1), "WIDEN_PAIRS": (4, 2), "SCALED": (2, 4)}[source]
    given = [rng.integers(0, 2**32, 16, np.uint32) for _ in range(inputs)]
    selector = {"WIDEN": "0x9180", "WIDEN_PAIRS": "0xC480", "SCALED": "0x4140"}[source]
    changed = assembly.replace(selector, "0x80C4")
    good, bad = ptx.run(assembly, outputs, given), ptx.run(changed, outputs, given)
    assert not all(map(np.array_equal, good, bad))
