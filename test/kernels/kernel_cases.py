"""Random paged caches whose unused rows are poison, with the reference's view of them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hma_kernels import GROUP, PAGE, TILE, TILE_BYTES, PagedKV, PageTable, reference
from hma_kernels.layout import EXPONENT_BYTES, data_offset, exponent_offset

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def widen(bf16_bits: np.ndarray) -> np.ndarray:
    return (bf16_bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Spec:
    """What a random cache looks like. Magnitudes are powers of two."""

    lengths: list[int]
    kv_heads: int
    head_dim: int
    v_head_dim: int
    k_magnitude: int = 0
    v_magnitude: int = 0
    layers: int = 2


@dataclass(frozen=True)
class Cache:
    kv: PagedKV
    table: PageTable

    def reference(self, layer: int) -> tuple[reference.KV, reference.Table]:
        kv = self.kv
        return (
            reference.KV(
                kv.k_bfp8[layer].numpy(),
                kv.v_bfp8[layer].numpy(),
                kv.k_bf16[layer].float().numpy(),
                kv.v_bf16[layer].float().numpy(),
            ),
            reference.Table(**{name: value.numpy() for name, value in vars(self.table).items()}),
        )


def empty_table(batch_size: int) -> PageTable:
    """The table of requests that have no page and no token."""
    nothing = torch.zeros(0, dtype=torch.int64)
    zeros = torch.zeros(batch_size + 1, dtype=torch.int64)
    return PageTable(zeros, nothing, nothing, zeros, nothing, nothing, zeros[:batch_size])


def random_cache(rng: np.random.Generator, spec: Spec) -> Cache:
    """Pages in random order and of random format; sometimes one page more than the tokens need."""
    entries: dict[str, list[list[tuple[int, int]]]] = {"bfp8": [], "bf16": []}
    counts = {"bfp8": 0, "bf16": 0}
    for length in spec.lengths:
        pages = -(-length // PAGE) + int(rng.random() < 0.2)
        formats = rng.choice(["bfp8", "bf16"], pages)
        for name, per_request in entries.items():
            pos = rng.permutation(np.flatnonzero(formats == name) * PAGE)
            per_request.append([(counts[name] + i, int(p)) for i, p in enumerate(pos)])
            counts[name] += len(pos)

    fields, owner = {}, {}
    for name, per_request in entries.items():
        place = rng.permutation(counts[name] + 3)
        flat = [(int(place[i]), pos) for own in per_request for i, pos in own]
        sizes = [len(own) for own in per_request]
        fields[f"{name}_indptr"] = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64)
        fields[f"{name}_indices"] = torch.tensor([p for p, _ in flat], dtype=torch.int64)
        fields[f"{name}_pos"] = torch.tensor([pos for _, pos in flat], dtype=torch.int64)
        lengths = np.repeat(spec.lengths, sizes)
        owner[name] = np.zeros(counts[name] + 3, np.int64)
        for (page, pos), length in zip(flat, lengths, strict=True):
            owner[name][page] = np.clip(length - pos, 0, PAGE)
    table = PageTable(**fields, seq_lens=torch.tensor(spec.lengths, dtype=torch.int64))

    k, v = (spec.head_dim, spec.k_magnitude), (spec.v_head_dim, spec.v_magnitude)
    heads, layers = spec.kv_heads, spec.layers
    return Cache(
        PagedKV(
            k_bfp8=_bfp8_pages(rng, layers, owner["bfp8"], heads, *k),
            v_bfp8=_bfp8_pages(rng, layers, owner["bfp8"], heads, *v),
            k_bf16=_bf16_pages(rng, layers, owner["bf16"], heads, *k),
            v_bf16=_bf16_pages(rng, layers, owner["bf16"], heads, *v),
        ),
        table,
    )


def _bfp8_pages(
    rng: np.random.Generator, layers: int, valid: np.ndarray, heads: int, dim: int, magnitude: int
) -> list[torch.Tensor]:
    shape = (len(valid), layers, heads, PAGE, dim)
    values = np.ldexp(rng.standard_normal(shape), magnitude).astype(np.float32)
    arena = reference.pack(values, "device")[..., 0, :, :].reshape(*shape[:3], -1)
    group = np.arange(dim // GROUP)
    for page, rows in enumerate(valid):
        row = np.arange(rows, PAGE)[:, None]
        poison = rng.choice([0xFF, 0x7F, 0xC0, 0x00], (layers, heads, PAGE - rows, 1))
        arena[page][..., exponent_offset(row, group)] = 0xFF
        bytes_at = data_offset(row, group)[..., None] + np.arange(GROUP)
        arena[page][..., bytes_at] = poison[..., None]
    pages = torch.from_numpy(arena.reshape(*shape[:3], dim // TILE, TILE_BYTES))
    return list(pages.unbind(1))


def _bf16_pages(
    rng: np.random.Generator, layers: int, valid: np.ndarray, heads: int, dim: int, magnitude: int
) -> list[torch.Tensor]:
    shape = (len(valid), layers, heads, PAGE, dim)
    values = np.ldexp(rng.standard_normal(shape), magnitude).astype(np.float32)
    for page, rows in enumerate(valid):
        values[page, ..., rows:, :] = rng.choice([np.nan, np.inf, -np.inf], (PAGE - rows, dim))
    return list(torch.from_numpy(values).bfloat16().unbind(1))


def fill_exponents(
    rng: np.random.Generator, pages: torch.Tensor, lowest: int, highest: int
) -> None:
    """New exponents in the rows that are not poison (E = 255), one in eight 0; random bytes."""
    tiles = pages.numpy()
    exponents = tiles[..., :EXPONENT_BYTES]
    fresh = rng.integers(lowest, highest + 1, exponents.shape)
    fresh[rng.random(exponents.shape) < 0.125] = 0
    exponents[...] = np.where(exponents == 255, 255, fresh)
    data = tiles[..., EXPONENT_BYTES:]
    data[...] = rng.integers(0, 256, data.shape)


def absolute(kv: reference.KV) -> reference.KV:
    """The same keys, and |V|: what rounding errors of the weighted sum are relative to."""
    v_bfp8 = kv.v_bfp8.copy()
    v_bfp8[..., EXPONENT_BYTES:] &= 0x7F
    return dataclasses.replace(kv, v_bfp8=v_bfp8, v_bf16=np.abs(kv.v_bf16))
