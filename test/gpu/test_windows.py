"""Sliding windows: what no query sees is nobody's work, and whatever it holds reaches no result."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from kernel_cases import Cache, Spec, random_cache
from test_cuda_decode import compiled
from test_triton_decode import to
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark.kernels.division import divider
from hma_kernels import PAGE, reference
from hma_kernels.base import DecodeCall, Plan
from hma_kernels.cuda import decode as cuda
from hma_kernels.layout import TILE_BYTES, data_offset, exponent_offset
from hma_kernels.paged import PageTable
from hma_kernels.triton import decode as triton
from hma_kernels.triton import visible
from hma_kernels.triton.visible import VisiblePages

FORMATS = ("bfp8", "bf16")
HALF = 16  # tokens of a tile of BF16


def plan_of(kernel: str, cache: Cache, heads: int, window: int, blocks: int | None = None) -> Plan:
    """cache: on the device."""
    if kernel == "triton":
        return triton.DecodePlan(cache.kv, cache.table, heads, window)
    gqa_group_size = heads // cache.kv.kv_heads
    library = compiled(cache.kv, gqa_group_size, torch.bfloat16, cache.kv.device)
    return cuda.DecodePlan(cache.kv, cache.table, heads, window, library, blocks)


def oldest(cache: Cache, window: int) -> np.ndarray:
    """[B] the first position that a request's query sees."""
    return np.maximum(cache.table.seq_lens.numpy() - 1 - window, 0)


def visible_tokens(cache: Cache, window: int, name: str) -> np.ndarray:
    """bool [entries, 32] of a format's entries: the definition, token by token."""
    indptr = getattr(cache.table, f"{name}_indptr").numpy()
    pos = getattr(cache.table, f"{name}_pos").numpy()
    request = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    position = pos[:, None] + np.arange(PAGE)
    query = cache.table.seq_lens.numpy()[request][:, None] - 1
    seen = (position <= query) & (position >= 0)
    return seen & (position >= query - window) if window >= 0 else seen


def poison_hidden(cache: Cache, window: int) -> None:
    """NaN, and what is worst in BFP8, in every token that no query sees."""
    for name in FORMATS:
        pages = getattr(cache.table, f"{name}_indices").numpy()
        for page, seen in zip(pages, visible_tokens(cache, window, name), strict=True):
            rows = np.flatnonzero(~seen)[:, None]
            for kind in ("k", "v"):
                for layer in getattr(cache.kv, f"{kind}_{name}"):
                    if name == "bf16":
                        layer[page][:, rows[:, 0]] = torch.nan
                        continue
                    group = np.arange(layer.shape[2] * 2)
                    flat = layer[page].view(layer.shape[1], layer.shape[2] * TILE_BYTES).numpy()
                    flat[:, exponent_offset(rows, group)] = 0xFF
                    flat[:, data_offset(rows, group)[..., None] + np.arange(16)] = 0xC1


def expected_of(cache: Cache, q: torch.Tensor, window: int) -> np.ndarray:
    return reference.decode_attention(
        q.double().numpy(), *cache.reference(1), scale=q.shape[2] ** -0.5, sliding_window=window
    )


WINDOWS = [0, 1, 15, 16, 31, 32, 33, 47, 63, 64, 100, 333, 10_000]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_equals_reference_beside_poison(
    rng: np.random.Generator, device: torch.device, kernel: str, window: int
) -> None:
    """Both formats mixed; the window ends anywhere in a page, or is longer than the request."""
    lengths = [0, *rng.integers(1, 700, 3).tolist(), window + 1, PAGE * int(rng.integers(1, 9))]
    lengths = [min(length, 800) for length in lengths]
    cache = random_cache(rng, Spec(lengths, 2, 64, 64))
    q = torch.from_numpy(rng.standard_normal((len(lengths), 8, 64))).bfloat16()
    expected = expected_of(cache, q, window)
    poison_hidden(cache, window)
    plan = plan_of(kernel, to(cache, device), 8, window, int(rng.choice([1, 3, 20])))
    out = torch.full((len(lengths), 8, 64), torch.nan, dtype=q.dtype, device=device)
    plan.run(DecodeCall(q.to(device), 1, 0.125, 0.0, out))
    assert_accurate(out.cpu(), expected)


@pytest.mark.parametrize("trial", range(6))
@pytest.mark.parametrize("window", [0, 20, 100, 500])
def test_spans_are_equal_in_visible_pages(
    rng: np.random.Generator, device: torch.device, window: int, trial: int
) -> None:
    """Every warp has as many tiles of visible pages as any other, but for one, and no tile of a
    hidden page. Tiles of a visible page whose own tokens are hidden are BF16 halves, at most one at
    each end of a request's window."""
    lengths = rng.integers(0, 3000, int(rng.integers(1, 8))).tolist()
    cache = random_cache(rng, Spec(lengths, 2, 32, 32, layers=1))
    moved, blocks = to(cache, device), int(rng.choice([1, 2, 5, 30]))
    plan = plan_of("cuda", moved, 8, window, blocks)
    instance = cuda.instance_for(32, 32, 4, torch.bfloat16, stages=3)
    rows = divider(instance).rows(plan._params(), plan._workspace.cpu())

    table = plan._table.to(torch.device("cpu"))
    seq_lens, begin = cache.table.seq_lens.numpy(), oldest(cache, window)
    warps = plan._blocks * instance.warps
    shares, hidden_halves, hidden_pages = np.zeros(warps, int), 0, 0
    for row in rows:
        for tile in range(row["tiles"]):
            if tile < row["bfp8_tiles"]:
                first = page = table.bfp8_pos[row["bfp8_entry"] + tile].item()
                tokens = PAGE
            else:
                half = tile - row["bfp8_tiles"] + row["bf16_half"]
                page = table.bf16_pos[row["bf16_entry"] + half // 2].item()
                first, tokens = page + half % 2 * HALF, HALF

            def seen(position: int, tokens: int, request: int = row["request"]) -> bool:
                return position + tokens > begin[request] and position < seq_lens[request]

            shares[row["warp"]] += seen(page, PAGE)
            hidden_pages += not seen(page, PAGE)
            hidden_halves += seen(page, PAGE) and not seen(first, tokens)

    counts = {name: visible_tokens(cache, window, name).any(1).sum() for name in FORMATS}
    total = 2 * (counts["bfp8"] + 2 * counts["bf16"])
    assert shares.sum() == total
    working = min(max(total // 2, 1), warps) if total else 0
    assert not shares[working:].any()
    assert np.ptp(shares[:working]) <= 1 if working else True
    assert hidden_pages == 0
    assert hidden_halves <= 2 * 2 * len(lengths)


@pytest.mark.parametrize("trial", range(4))
def test_work_items_are_cut_from_visible_pages(
    rng: np.random.Generator, device: torch.device, trial: int
) -> None:
    """The Triton kernel's: as many for each request as its visible pages ask for."""
    window = int(rng.choice([0, 50, 200]))
    lengths = rng.integers(0, 4000, int(rng.integers(2, 6))).tolist()
    cache = random_cache(rng, Spec(lengths, 1, 32, 32, layers=1))
    plan = plan_of("triton", to(cache, device), 4, window)
    pages = np.zeros(len(lengths), int)
    for name in FORMATS:
        indptr = getattr(cache.table, f"{name}_indptr").numpy()
        seen = visible_tokens(cache, window, name).any(1)
        pages += [seen[a:b].sum() for a, b in pairwise(indptr)]
    each = max(1, -(-pages.sum() // plan._schedule._target_items))
    items = plan._schedule.item_indptr.cpu().numpy()
    np.testing.assert_array_equal(np.diff(items), -(-pages // each))


@pytest.mark.parametrize("window", [-1, *WINDOWS])
def test_visible_pages_are_those_of_the_definition(
    rng: np.random.Generator, device: torch.device, window: int
) -> None:
    """In the table's order, and all of them when there is no window."""
    lengths = [0, *rng.integers(1, 20_000 if window > 300 else 2_000, 4).tolist()]
    cache = random_cache(rng, Spec(lengths, 1, 32, 32, layers=1))
    given = cache.table.to(device)
    kept = VisiblePages(given, window).table
    if window < 0:
        assert kept is given
        return
    for name in FORMATS:
        seen = visible_tokens(cache, window, name).any(1)
        indptr = np.concatenate([[0], seen.cumsum()])[getattr(cache.table, f"{name}_indptr")]
        assert getattr(kept, f"{name}_indptr").tolist() == indptr.tolist()
        for field in ("indices", "pos"):
            expected = getattr(cache.table, f"{name}_{field}")[seen]
            got = getattr(kept, f"{name}_{field}")[: len(expected)]
            assert torch.equal(got.cpu(), expected)


def grown(table: PageTable, size: dict[str, int]) -> PageTable:
    """The same table in larger tensors."""
    return replace(
        table,
        **{
            name: torch.cat([value, value.new_zeros(size[name] - len(value))])
            for name, value in vars(table).items()
        },
    )


@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_refreshed_plan_equals_a_new_one(
    rng: np.random.Generator, device: torch.device, kernel: str
) -> None:
    """The table's tensors get other contents, with more and with fewer visible pages; the plan's
    own stay where they are."""
    cache = to(random_cache(rng, Spec([900, 40, 0], 1, 64, 64)), device)
    size = {name: len(value) + 50 for name, value in vars(cache.table).items()}
    for name in ("bfp8_indptr", "bf16_indptr", "seq_lens"):
        size[name] = len(getattr(cache.table, name))
    still = grown(cache.table, size)
    q = torch.from_numpy(rng.standard_normal((3, 4, 64))).bfloat16().to(device)

    def run(plan: Plan) -> torch.Tensor:
        out = torch.full((3, 4, 64), torch.nan, dtype=q.dtype, device=device)
        plan.run(DecodeCall(q, 1, 0.125, 0.0, out))
        return out

    plan = plan_of(kernel, replace(cache, table=still), 4, 100)
    places = [value.data_ptr() for value in vars(plan._table).values()]
    for lengths in ([900, 40, 0], [60, 0, 0], [431, 40, 0], [900, 3, 0]):
        still.seq_lens.copy_(torch.tensor(lengths))
        plan.refresh()
        assert torch.equal(run(plan), run(plan_of(kernel, replace(cache, table=still), 4, 100)))
        assert [value.data_ptr() for value in vars(plan._table).values()] == places


class Operations(TorchDispatchMode):
    """Names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


def test_an_update_is_two_launches(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation of torch, so none that waits, whatever is in the table."""
    launched: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: launched.append(grid)

    monkeypatch.setattr(visible, "_count", Recorded())
    monkeypatch.setattr(visible, "_keep", Recorded())
    pages = VisiblePages(random_cache(rng, Spec([300, 5], 1, 32, 32)).table, 64)
    launched.clear()
    with Operations() as operations:
        pages.update()
    assert launched == [(2,), (2,)]
    assert operations.seen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_a_captured_refresh_serves_later_tables(
    rng: np.random.Generator, device: torch.device, kernel: str
) -> None:
    cache = to(random_cache(rng, Spec([900, 700], 1, 64, 64)), device)
    q = torch.from_numpy(rng.standard_normal((2, 4, 64))).bfloat16().to(device)
    out = torch.empty_like(q)
    plan = plan_of(kernel, cache, 4, 100)
    plan.run(DecodeCall(q, 1, 0.125, 0.0, out))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.refresh()
        plan.run(DecodeCall(q, 1, 0.125, 0.0, out))
    for lengths in ([900, 700], [60, 1], [431, 650]):
        cache.table.seq_lens.copy_(torch.tensor(lengths))
        graph.replay()
        expected = torch.empty_like(q)
        plan_of(kernel, cache, 4, 100).run(DecodeCall(q, 1, 0.125, 0.0, expected))
        assert torch.equal(out, expected)
