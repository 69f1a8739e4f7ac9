"""SGLang's page allocator over a slab arena: which tokens get which page format.

Rules. A prompt's full pages are BFP8. Its part-full last page is BF16, because
the request's own tokens continue it; on a decode server that page also owns a
BFP8 landing page, into which the prefill server writes. Generated pages are
BF16. Where nothing arrives over the wire, a full prompt page may also be stored
as BF16 (its values are the same) when no BFP8 page is left.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from typing_extensions import override

from hma_kernels.layout import PAGE, SLAB_TOKENS
from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.arena import PageFormat, PageIds, SlabArena
from sglang_hma.kvcache.budget import AdmittedBudget, MixedPrefillBudget
from sglang_hma.kvcache.held_pages import Fence, HeldPages, NoFence, StreamFence
from sglang_hma.kvcache.pool import MixedKVPool
from sglang_hma.kvcache.usage import Usage, pool_label, show_usage

BFP8, BF16 = PageFormat.BFP8, PageFormat.BF16


class SlabPageAllocator(PagedTokenToKVPoolAllocator):
    """Token slots in BFP8 and BF16 pages. All bookkeeping is on the host, and nothing waits for the
    device but an allocation that finds no page while returned ones are still in use there.

    `other_streams` gives the streams that use pages beside the scheduler's own. `tokens_ahead`: how
    many tokens a request's next step may need slots for, more than one where drafts are verified.
    """

    _kvcache: MixedKVPool
    _held: HeldPages

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.other_streams: Callable[[], Sequence[Any]] = tuple
        self.tokens_ahead = 1
        super().__init__(*args, **kwargs)
        for fmt in (BFP8, BF16):
            name = fmt.name.lower() + pool_label(self._kvcache)
            show_usage(self, name, partial(usage_of, fmt))

    @override
    def clear(self) -> None:
        if hasattr(self, "_held"):
            self._held.take(wait=True)
        self._held = HeldPages(self.fence)
        self._mirrored: npt.NDArray[np.bool_] | None = None
        self.arena = SlabArena(self.size // SLAB_TOKENS)
        self.landing: dict[int, int] = {}
        self.free_group = None
        self.free_page_ids_group: list[torch.Tensor] = []
        self._extend_demand: tuple[int, ...] | None = None
        self._mirror_formats()

    def fence(self) -> Fence:
        """The present point in the device's work."""
        if torch.device(self.device).type == "cpu":
            return NoFence()
        return StreamFence(self.other_streams())

    @override
    def available_size(self) -> int:
        """Free room in tokens, as if all of it became BFP8 pages."""
        self._reclaim()
        return self.arena.free_in_bfp8_pages() * PAGE

    def live_tokens(self) -> int:
        """Tokens that the handed-out pages could hold, without landing pages and returned ones."""
        self._reclaim()
        return (self.arena.live_pages - len(self.landing) - len(self._held)) * PAGE

    @override
    def get_all_free_pages(self) -> torch.Tensor:
        self._reclaim()
        return torch.as_tensor(self.arena.free_page_ids(), device=self.device)

    @override
    def merge_and_sort_free(self) -> None:
        pass

    @override
    def alloc(self, need_size: int) -> torch.Tensor | None:
        return self._alloc_prompts([(0, need_size)], [-1])

    @override
    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for each request's tokens prefix..seq, all of them prompt tokens."""
        spans = list(zip(prefix_lens_cpu.tolist(), seq_lens_cpu.tolist(), strict=True))
        inside_page = any(start % PAGE for start, _ in spans)
        return self._alloc_prompts(spans, last_loc.tolist() if inside_page else [-1] * len(spans))

    def _alloc_prompts(
        self, spans: list[tuple[int, int]], last_slots: list[int]
    ) -> torch.Tensor | None:
        self._reclaim()
        counts, num_bfp8, num_bf16 = self._prompt_pages(spans)
        pages = self._take(num_bfp8, num_bf16)
        if pages is None:
            return None
        # A request's BFP8 pages come first: where they run out, BF16 pages stand in.
        bfp8, bf16 = (iter(kind) for kind in pages)
        slots = []
        for (start, end), last_slot, (full, tails) in zip(spans, last_slots, counts, strict=True):
            chosen = [*islice(bfp8, full)]
            chosen += islice(bf16, full + tails - len(chosen))
            slots.append(slots_of(chosen, start, end, last_slot))
        return self.to_device(torch.from_numpy(np.concatenate(slots)))

    def _prompt_pages(self, spans: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], int, int]:
        """Of each span its (BFP8, BF16) pages by the rules; and how many of each kind to take for
        all of them, where BF16 pages stand in."""
        counts = [page_counts(start, end, end) for start, end in spans]
        num_bfp8, num_bf16 = (sum(column) for column in zip(*counts, strict=True))
        kept = tail_to_come(spans)
        if self.arena.any_format_beside(num_bf16 + kept) < num_bfp8:
            kept = 0
        spilled = max(0, num_bfp8 - max(0, self.arena.available_beside(num_bf16 + kept)))
        return counts, num_bfp8 - spilled, num_bf16 + spilled

    def fits_extend(self, spans: list[tuple[int, int]]) -> bool:
        """Whether `alloc_extend` would succeed."""

        def fits() -> bool:
            _, num_bfp8, num_bf16 = self._prompt_pages(spans)
            return self.arena.fits(bfp8=num_bfp8, bf16=num_bf16)

        return self.evict_until(None, fits)

    def fits_generated(self, pages: int) -> bool:
        """Whether so many BF16 pages could be taken."""
        return self.evict_until(None, lambda: self.arena.available(BF16) >= pages)

    def alloc_landing(self, prompt_len: int, end: int, start: int = 0) -> torch.Tensor | None:
        """Slots int64 [end - start] on the host for a request whose prompt a peer will write.

        `start`, a page's edge, is where the pages that the request has already end. Tokens behind
        `prompt_len` are generated ones. The peer writes raw BFP8, so a part-full last prompt page
        gets a landing page beside its BF16 page. None if it is full.
        """
        num_bfp8, num_bf16 = page_counts(start, prompt_len, end)
        lands = end == prompt_len and prompt_len % PAGE != 0
        pages = self._take(num_bfp8 + lands, num_bf16)
        if pages is None:
            return None
        bfp8, bf16 = pages
        if lands:
            self.landing[int(bf16[0])] = int(bfp8[-1])
        return torch.from_numpy(slots_of([*bfp8[:num_bfp8], *bf16], start, end, -1))

    def alloc_again(self, in_bf16: torch.Tensor, tokens: int) -> torch.Tensor | None:
        """Slots int64 [tokens] on the host in pages of the formats that a request's pages had:
        `in_bf16` bool [pages], as MixedKVPool.get_cpu_copy tells it. None if it is full."""
        num_bf16 = int(in_bf16.sum())
        pages = self._take(len(in_bf16) - num_bf16, num_bf16)
        if pages is None:
            return None
        bfp8, bf16 = map(iter, pages)
        chosen = [next(bf16 if plain else bfp8) for plain in in_bf16.tolist()]
        return torch.from_numpy(slots_of(chosen, 0, tokens, -1))

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """Enqueues the copy; the host goes on."""
        if torch.device(self.device).type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def fits_landing(
        self, prompt_len: int, end: int, start: int = 0, *, when_empty: bool = False
    ) -> bool:
        """Whether `alloc_landing` would succeed and leave room for the first step."""
        self._reclaim()
        num_bfp8, num_bf16 = page_counts(start, prompt_len, end + self.tokens_ahead)
        fits = self.arena.fits_when_empty if when_empty else self.arena.fits
        return fits(bfp8=num_bfp8 + 1, bf16=num_bf16)

    def fits_again(self, in_bf16: torch.Tensor, end: int, *, when_empty: bool = False) -> bool:
        """Whether `alloc_again` would succeed and leave room for the positions up to `end`."""
        self._reclaim()
        pages, num_bf16 = len(in_bf16), int(in_bf16.sum())
        more = max(0, -(-end // PAGE) - pages)
        fits = self.arena.fits_when_empty if when_empty else self.arena.fits
        return fits(bfp8=pages - num_bf16, bf16=num_bf16 + more)

    def fits_prompts(self, lengths: list[int]) -> bool:
        """Whether `alloc_extend` would succeed for whole prompts of these lengths together, and
        leave room for the first step of each."""
        self._reclaim()
        counts = [page_counts(0, length, length + self.tokens_ahead) for length in lengths]
        num_bfp8, num_bf16 = (sum(column) for column in zip(*counts, strict=True))
        return self.arena.fits(bfp8=num_bfp8, bf16=num_bf16)

    def _take(self, num_bfp8: int, num_bf16: int) -> tuple[PageIds, PageIds] | None:
        self._reclaim()
        pages = self.arena.alloc_both(bfp8=num_bfp8, bf16=num_bf16)
        if pages is None and self._reclaim(wait=True):
            pages = self.arena.alloc_both(bfp8=num_bfp8, bf16=num_bf16)
        if pages is not None:
            self._mirror_formats()
        return pages

    @override
    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot for each request's next token; seq_lens already count it."""
        self._reclaim()
        opening = ((seq_lens_cpu - 1) % PAGE == 0).nonzero()[:, 0]
        pages = self.arena.alloc(BF16, len(opening))
        if pages is None and self._reclaim(wait=True):
            pages = self.arena.alloc(BF16, len(opening))
        if pages is None:
            return None
        slots = last_loc + 1
        if len(pages):
            self._mirror_formats()
            new = self.to_device(torch.from_numpy(pages * PAGE).to(slots.dtype))
            slots[self.to_device(opening)] = new
        return slots

    def alloc_generated(
        self, spans: Sequence[tuple[int, int]], last_slots: Sequence[int]
    ) -> torch.Tensor | None:
        """Slots of positions start..end of several requests, one after the other, for tokens that
        will be generated; `last_slots`: that of start - 1 where a page is open. None if it is
        full."""
        counts = [-(-end // PAGE) - -(-start // PAGE) for start, end in spans]
        pages = self._take(0, sum(counts))
        if pages is None:
            return None
        new = iter(pages[1])
        slots = [
            slots_of([*islice(new, count)], start, end, last)
            for (start, end), last, count in zip(spans, last_slots, counts, strict=True)
        ]
        return self.to_device(torch.from_numpy(np.concatenate(slots)))

    def transfer_pages(self, pages: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The pages that a peer writes to: a page with a landing page is reached there."""
        return np.asarray([self.landing.get(int(p), int(p)) for p in pages], dtype=np.int32)

    def commit_landing(self, page: int) -> None:
        """Unpack the landed bytes into BF16 page `page` and free the landing page."""
        source = self.landing.pop(page, None)
        if source is not None:
            self._kvcache.unpack_page(source, page)
            self._release_page_ids(torch.tensor([source]))

    @override
    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        """The pages wait until all that the device has been asked to do so far is done."""
        self._held.hold(torch.cat(page_ids))
        self._reclaim()

    def _reclaim(self, *, wait: bool = False) -> bool:
        """Whether returned pages have become free, those that the device is done with; with `wait`
        all of them. Ranks of a server must count alike, and their devices do not keep step."""
        pages = self._held.take(wait=wait or has_other_ranks())
        if not pages:
            return False
        self.arena.free(pages)
        self.arena.free([self.landing.pop(p) for p in pages if p in self.landing])
        self._mirror_formats()
        return True

    @override
    def _debug_check_no_duplicate_pages(self) -> None:
        """The arena itself refuses a page that is not handed out."""

    def _mirror_formats(self) -> None:
        is_bf16 = self.arena.formats == BF16
        if self._mirrored is None or not np.array_equal(is_bf16, self._mirrored):
            self._mirrored = is_bf16
            formats = self.to_device(torch.from_numpy(is_bf16))
            self._kvcache.slab_is_bf16.copy_(formats, non_blocking=True)

    # -- capacity questions that SGLang asks its allocator --

    @override
    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> PrefillBudget:
        config = HmaConfig.from_env()
        if config is not None and config.role == "decode":
            return AdmittedBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        self.evict_until(tree_cache, lambda: self.arena.available(BF16) > 0)
        return MixedPrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    @override
    def get_extend_allocation_demand(
        self,
        prefix_lens_cpu: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        *,
        conservative_num_tokens: int,
        shard_size: int,
    ) -> int:
        spans = list(zip(prefix_lens_cpu.tolist(), seq_lens_cpu.tolist(), strict=True))
        counts = [page_counts(start, end, end) for start, end in spans]
        full, tails = (sum(column) for column in zip(*counts, strict=True))
        self._extend_demand = full, tails + tail_to_come(spans)
        return (full + tails) * PAGE

    @override
    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool | None:
        """Before an extend it serves the page counts of `get_extend_allocation_demand`,
        which SGLang calls right before; otherwise all tokens are generated ones."""
        full, tails = self._extend_demand or (0, -(-num_tokens // PAGE))
        self._extend_demand = None
        return self.evict_until(
            tree_cache,
            lambda: (
                self.arena.available_beside(tails) >= 0
                and self.arena.any_format_beside(tails) >= full
            ),
        )

    @override
    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        pages = -(-num_tokens // PAGE)
        return self.evict_until(tree_cache, lambda: self.arena.available(BF16) >= pages)

    def evict_until(self, tree_cache: Any, satisfied: Callable[[], bool]) -> bool:
        """Evict unlocked prefixes until `satisfied()` or nothing is left to evict."""
        self._reclaim()
        if satisfied() or (self._reclaim(wait=True) and satisfied()):
            return True
        if tree_cache is None or not tree_cache.supports_prefix_sharing():
            return False
        while tree_cache.evictable_size() > 0:
            if tree_cache.evict(EvictParams(num_tokens=SLAB_TOKENS)).num_tokens_evicted == 0:
                break
            if satisfied():
                return True
        return satisfied()


def has_other_ranks() -> bool:
    """Whether this process is one of several of a server."""
    ranks = torch.distributed
    return ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1


def usage_of(fmt: PageFormat, allocator: SlabPageAllocator) -> Usage:
    used = allocator.arena.used(fmt)
    return used, used + allocator.arena.available(fmt)


def page_counts(start: int, prompt_end: int, end: int) -> tuple[int, int]:
    """(BFP8, BF16) pages that positions start..end of a request open."""
    first = -(-start // PAGE)
    opened = max(0, -(-end // PAGE) - first)
    full = min(max(0, prompt_end // PAGE - first), opened)
    return full, opened - full


def tail_to_come(spans: list[tuple[int, int]]) -> int:
    """BF16 pages to keep free while these spans are placed: 1 if one may be a chunk, else 0.

    A chunk ends on a page's edge, and its prompt was admitted with room for its
    part-full last page. BFP8 pages must not take the last slab that could hold it.
    Only one prompt at a time is in chunks.
    """
    return int(any(end % PAGE == 0 for _, end in spans))


def slots_of(pages: list[int], start: int, end: int, last_slot: int) -> npt.NDArray[np.int64]:
    """Token slots of positions start..end: the rest of the page of `last_slot`, then `pages`."""
    head = min(-start % PAGE, end - start)
    first = np.arange(last_slot + 1, last_slot + 1 + head, dtype=np.int64)
    rest = (np.asarray(pages, dtype=np.int64)[:, None] * PAGE + np.arange(PAGE)).reshape(-1)
    return np.concatenate([first, rest[: end - start - head]])
