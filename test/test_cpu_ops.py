"""What replaces SGLang's Triton kernels on a CPU, against their definition in float64."""

import random
import struct

import numpy as np
import pytest
import torch

from sglang_hma.cpu_ops import gate_sigmoid_mul, murmur_hash32, softcap_logits


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("apart", [False, True])
def test_softcap(seed: int, cap: float | None, apart: bool) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(7, 65) * 10
    given = logits.numpy().astype(np.float64)
    expected = given if cap is None else cap * np.tanh(given / cap)
    output = torch.empty_like(logits) if apart else None
    found = softcap_logits(None, logits, cap, output)  # type: ignore[arg-type]
    assert found is (output if apart else logits)
    assert np.allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("add", [False, True])
def test_the_gate_of_shared_experts(seed: int, add: bool) -> None:
    torch.manual_seed(seed)
    hidden, shared, before = (torch.randn(9, 64) for _ in range(3))
    weight, output = torch.randn(64), before.clone()
    gate_sigmoid_mul(None, hidden, weight, shared, output, do_add=add)  # type: ignore[arg-type]
    h, w, s, b = (x.numpy().astype(np.float64) for x in (hidden, weight, shared, before))
    expected = s / (1 + np.exp(-(h @ w)))[:, None] + (b if add else 0)
    assert np.allclose(output.numpy(), expected, rtol=1e-5, atol=1e-6)
    alone = before[3:4].clone()
    gate_sigmoid_mul(None, hidden[3:4], weight, shared[3:4], alone, do_add=add)  # type: ignore[arg-type]
    assert torch.equal(alone[0], output[3])


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, after its author's description."""
    state, blocks = 0, len(data) // 4 * 4

    def rotated(number: int, bits: int) -> int:
        return (number << bits | number >> 32 - bits) & 0xFFFFFFFF

    def scrambled(word: int) -> int:
        return rotated(word * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF

    for start in range(0, blocks, 4):
        state ^= scrambled(int.from_bytes(data[start : start + 4], "little"))
        state = (rotated(state, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    if data[blocks:]:
        state ^= scrambled(int.from_bytes(data[blocks:], "little"))
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    state = (state ^ state >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return state ^ state >> 16


def test_murmur_hash(seed: int) -> None:
    for text, known in ((b"hello", 0x248BFA47), (b"hello, world", 0x149BBB7F)):
        assert murmur3(text) == known
    rng = random.Random(seed)
    seeds = [rng.randrange(-(2**63), 2**63) for _ in range(6)]
    positions = [rng.randrange(2**31) for _ in seeds]
    columns = [0, 1, 2**31 - 1, *(rng.randrange(2**31) for _ in range(20))]
    rows = torch.tensor(seeds).view(torch.uint64), torch.tensor(positions)
    found = murmur_hash32(None, *rows, torch.tensor(columns))  # type: ignore[arg-type]
    assert found.dtype == torch.uint32
    expected = [
        [murmur3(struct.pack("<qII", each, at, column)) for column in columns]
        for each, at in zip(seeds, positions, strict=True)
    ]
    assert found.tolist() == expected
