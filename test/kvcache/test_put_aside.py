"""A request that is put aside comes back with the pages that it had: formats and bytes."""

import random

import torch

from hma_kernels import PAGE
from hma_kernels.layout import IDS_PER_SLAB

from .test_allocator import DIM, HEADS, LAYERS, extend, make


def test_a_prompt_computed_here_whose_pages_are_bf16(seed: int) -> None:
    """In the last slab of a pool, where a prompt that ends on a page's edge leaves room for a BF16
    page behind it."""
    tokens = PAGE
    torch.manual_seed(seed)
    alloc = make(2)
    pool = alloc._kvcache
    assert alloc.alloc_landing(32 * PAGE, 32 * PAGE) is not None
    assert alloc.fits_prompts([tokens]) is False and alloc.arena.fits(bfp8=1, bf16=0)
    slots = extend(alloc, [(0, tokens)], [-1])
    assert slots is not None and bool(pool.formats_of(slots).all())
    rows = torch.randn(tokens, HEADS, DIM)
    for layer in range(LAYERS):
        pool.write_prompt(layer, slots, rows, rows)
    saved = pool.get_cpu_copy(slots)
    alloc.free(slots)
    assert alloc.fits_again(saved.in_bf16, tokens + 1)
    again = alloc.alloc_again(saved.in_bf16, tokens)
    assert again is not None
    pool.load_cpu_copy(saved, again)
    assert same_bytes(pool.get_cpu_copy(again), saved)


def test_any_mixture_comes_back(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(30):
        alloc = make(6)
        pool = alloc._kvcache
        formats = torch.tensor([rng.random() < 0.5 for _ in range(rng.randrange(1, 40))])
        tokens = (len(formats) - 1) * PAGE + rng.randrange(1, PAGE + 1)
        fits = alloc.fits_again(formats, tokens)
        slots = alloc.alloc_again(formats, tokens)
        assert fits == (slots is not None)
        if slots is None:
            continue
        assert torch.equal(pool.formats_of(slots), formats)
        for buffer in pool.k_buffer + pool.v_buffer:
            buffer.copy_(torch.randint(0, 256, buffer.shape, dtype=torch.uint8))
        saved = pool.get_cpu_copy(slots)
        alloc.free(slots)
        while alloc.alloc_landing(rng.randrange(1, 200), 200) is not None:
            pass
        fresh = make(6)
        again = fresh.alloc_again(saved.in_bf16, tokens)
        assert again is not None
        fresh._kvcache.load_cpu_copy(saved, again)
        assert same_bytes(fresh._kvcache.get_cpu_copy(again), saved)
        pages = (again[::PAGE] // PAGE // IDS_PER_SLAB).tolist()
        assert len(pages) == len(formats)


def same_bytes(one, other) -> bool:
    pairs = [
        (a, b)
        for of_one, of_other in zip(one.layers, other.layers, strict=True)
        for kind_a, kind_b in zip(of_one, of_other, strict=True)
        for a, b in zip(kind_a, kind_b, strict=True)
    ]
    return torch.equal(one.in_bf16, other.in_bf16) and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs
    )
