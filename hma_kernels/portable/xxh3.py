"""XXH3-64 of more than 240 bytes, seed 0: its constants, and the algorithm in numpy.

https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md: 8 accumulators take in stripes of 64
bytes, are scrambled after each chunk of 16 stripes, take in the last 64 bytes once more, and are
folded into 64 bits.
"""

import ctypes

import numpy as np
import numpy.typing as npt

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
PRIME32_1, PRIME32_2, PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
PRIME64_1, PRIME64_2, PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
PRIME64_4, PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
AVALANCHE = 0x165667919E3779F9

STRIPE, STRIPES = 64, 16
CHUNK = STRIPE * STRIPES

Addresses = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def _secret_words(offset: int) -> list[int]:
    return [int.from_bytes(SECRET[offset + 8 * i :][:8], "little") for i in range(8)]


# [18][8]: the keys of the 16 stripes of a chunk, of scrambling, and of the last stripe.
KEYS = np.array(
    [*(_secret_words(8 * row) for row in range(STRIPES + 1)), _secret_words(len(SECRET) - 64 - 7)],
    dtype=np.uint64,
)
START = np.array(
    [
        *(PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3),
        *(PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1),
    ],
    dtype=np.uint64,
)
_MERGE = np.array(_secret_words(11), dtype=np.uint64)


def accumulate(addresses: Addresses, length: int) -> Words:
    """In numpy, all blocks at a time."""
    blocks = np.stack(
        [
            np.frombuffer(memoryview((ctypes.c_char * length).from_address(address)), np.uint64)
            for address in addresses.tolist()
        ]
    )
    acc = np.tile(START, (len(addresses), 1))
    swap = np.arange(8) ^ 1

    def stripe(at: int, key: Words) -> None:
        data = blocks[:, at // 8 : at // 8 + 8]
        keyed = data ^ key
        acc[:] += data[:, swap] + (keyed & np.uint64(0xFFFFFFFF)) * (keyed >> np.uint64(32))

    chunks = (length - 1) // CHUNK
    for chunk in range(chunks):
        for row in range(STRIPES):
            stripe(chunk * CHUNK + row * STRIPE, KEYS[row])
        acc[:] = (acc ^ (acc >> np.uint64(47)) ^ KEYS[STRIPES]) * np.uint64(PRIME32_1)
    for row in range((length - 1 - chunks * CHUNK) // STRIPE):
        stripe(chunks * CHUNK + row * STRIPE, KEYS[row])
    stripe(length - STRIPE, KEYS[STRIPES + 1])
    return acc


def merge(acc: Words, length: int) -> Words:
    """Each block's 8 accumulators, [n, 8], as its hash."""
    mixed = acc ^ _MERGE
    total: Words = _fold(mixed[:, ::2], mixed[:, 1::2]).sum(axis=1, dtype=np.uint64)
    total += np.uint64(length * PRIME64_1 % 2**64)
    total ^= total >> np.uint64(37)
    total *= np.uint64(AVALANCHE)
    total ^= total >> np.uint64(32)
    return total


def _fold(a: Words, b: Words) -> Words:
    """The xor of the low and the high half of the 128-bit products a * b."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    al, ah, bl, bh = a & low, a >> half, b & low, b >> half
    middle = ah * bl + (al * bl >> half)
    other = al * bh + (middle & low)
    high: Words = ah * bh + (middle >> half) + (other >> half)
    return high ^ (a * b)
