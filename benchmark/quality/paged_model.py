"""A transformers model whose attention is the product's: its KV pool, its kernels.

A document is scored as a pair of servers would have written it: its first tokens are prefilled with
prefill's weights into a KV pool, the rest is decoded with decode's weights over that pool. What
comes next is known, so all the decoded tokens are one batch, in which token i is a request of
its own that sees the pages up to itself; they share pages as requests with a common prefix do.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from benchmark.quality.policies import Policy
from hma_kernels import PAGE, DecodePlan, PageTable, extend_attention
from hma_kernels.layout import IDS_PER_SLAB, SLAB_TOKENS
from hma_kernels.portable.page_table import page_table
from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.arena import PageFormat, SlabArena
from sglang_hma.prefill.compare import pack_weights

NAME = "hma_pages"
PLAIN = frozenset[str]()


@dataclass
class Phase:
    """What the attention of the running forward pass does."""

    policy: Policy
    slots: torch.Tensor  # [tokens], where the new rows go
    table: PageTable  # decode's
    plan: DecodePlan | None  # None is prefill


class Models:
    """A checkpoint in each of the forms that policies ask for, each loaded once."""

    def __init__(self, path: Path) -> None:
        AttentionInterface.register(NAME, _attend)
        self.path = path
        self._made: dict[tuple[torch.dtype, frozenset[str]], Any] = {}

    def get(self, dtype: torch.dtype, packed: frozenset[str] = PLAIN, attention: str = NAME) -> Any:
        """`packed`: the groups of linear weights that go through BFP8."""
        key = dtype, packed
        if key not in self._made:
            if packed:
                model = copy.deepcopy(self.get(dtype))
                pack_weights(model, packed)
            else:
                model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).eval()
                if dtype is torch.bfloat16 and not _bf16_is_fast():
                    emulate_bf16(model)
            self._made[key] = model
        self._made[key].set_attn_implementation(attention)
        return self._made[key]


def _bf16_is_fast() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Bf16ByFloat32(torch.nn.Linear):
    """A BF16 linear layer whose weights, BF16 values, are held in float32.

    A BF16 product accumulates in float32 and rounds once; so does this, several times as fast on a
    CPU without BF16 instructions. Only the order of summation may differ.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(torch.float32)).to(x.dtype)


def emulate_bf16(model: Any) -> None:
    """In place; a tied output head gets weights of its own."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = Bf16ByFloat32
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.detach().to(torch.float32)))


def reply_of(context: int) -> range:
    """The middle third of a prompt, in whole pages."""
    third = context // PAGE // 3 * PAGE
    return range(third, context - third)


class PagedModel:
    """Scores documents of up to `tokens` tokens. Only one at a time."""

    def __init__(self, models: Models, tokens: int) -> None:
        os.environ.update(HmaConfig(role="decode").environment())
        from sglang_hma.kvcache.pool import MixedKVPool

        self.models = models
        config = models.get(torch.bfloat16).config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.heads = config.num_attention_heads
        # A prompt in BF16 takes 32 slabs where one in BFP8 takes 17, and each format its own; a
        # kept reply has pages of both.
        self.slabs = 3 * -(-tokens // SLAB_TOKENS) + 2
        self.pool = MixedKVPool(
            size=self.slabs * SLAB_TOKENS,
            page_size=PAGE,
            dtype=torch.bfloat16,
            head_num=config.num_key_value_heads,
            head_dim=dim,
            layer_num=config.num_hidden_layers,
            device="cpu",
            enable_memory_saver=False,
        )

    @torch.inference_mode()
    def logits(self, ids: list[int], context: int, policy: Policy) -> torch.Tensor:
        """float32 [len(ids) - context, vocabulary]: row i predicts ids[context + i].

        The first `context` tokens, a multiple of 32, are prefilled.
        """
        if policy.kv == "float32":
            return self._reference(ids, context)
        assert context % PAGE == 0
        reply = reply_of(context) if policy.own_reply else range(0)
        slots, own = self._slots(context, len(ids), len(reply), in_bf16=policy.kv != "bfp8")
        prefill = self.models.get(policy.dtype, frozenset(policy.prefill_packed))
        decode = self.models.get(policy.dtype, frozenset(policy.decode_packed))
        first = self._forward(prefill, ids[:context], 0, policy, slots, keep=1)
        if reply:
            slots[reply.start : reply.stop] = own
            said = ids[reply.start : reply.stop]
            self._forward(decode, said, reply.start, policy, slots, keep=1)
        rest = self._forward(decode, ids[context:-1], context, policy, slots, keep=0)
        return torch.cat([first, rest]).to(torch.float32)

    def _reference(self, ids: list[int], context: int) -> torch.Tensor:
        """All in float32, K and V included, by transformers alone."""
        model = self.models.get(torch.float32, attention="sdpa")
        out = model(torch.tensor([ids[:-1]]), use_cache=False, logits_to_keep=len(ids) - context)
        return out.logits[0]

    def _slots(
        self, context: int, tokens: int, own: int, *, in_bf16: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token: prompt pages in their format, then BF16 pages; of `own` more tokens, in
        BF16 pages."""
        arena = SlabArena(self.slabs)
        prompt, rest = context // PAGE, -(-(tokens - context) // PAGE) + own // PAGE
        if in_bf16:
            pages = arena.alloc(PageFormat.BF16, prompt + rest)
        else:
            both = arena.alloc_both(bfp8=prompt, bf16=rest)
            pages = None if both is None else torch.cat([torch.from_numpy(ids) for ids in both])
        assert pages is not None, "the pool is too small"
        formats = torch.from_numpy(arena.formats == PageFormat.BF16)
        self.pool.slab_is_bf16[: len(formats)] = formats
        pages = torch.as_tensor(pages)
        assert int(pages.max()) < len(formats) * IDS_PER_SLAB
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
        return slots[:tokens].clone(), slots[len(slots) - own :]

    def _forward(
        self,
        model: Any,
        ids: list[int],
        start: int,
        policy: Policy,
        slots: torch.Tensor,
        keep: int,
    ) -> torch.Tensor:
        """Logits of the last `keep` of `ids`, 0 for all; `ids` are at positions `start` and on."""
        positions = torch.arange(start, start + len(ids))
        lens = positions + 1 if start else torch.tensor([0])
        table = page_table(
            slots[None].to(torch.int32),
            torch.zeros_like(lens),
            lens,
            self.pool.slab_is_bf16,
        )
        plan = DecodePlan(self.pool.kv, table, num_q_heads=self.heads) if start else None
        phase = Phase(policy, slots[positions], table, plan)
        out = model(
            torch.tensor([ids]),
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=keep,
            paged=(self.pool, phase),
        )
        return out.logits[0]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged: tuple[Any, Phase],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
    pool, phase = paged
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    layer = module.layer_idx
    if phase.plan is not None:
        pool.write_generated(layer, phase.slots, k, v)
        return phase.plan.run(q, layer, scale=scaling)[None], None
    k, v = store_prompt(pool, layer, phase, k, v)
    rows = torch.tensor([0, len(q)])
    out = extend_attention(q, k, v, pool.kv, layer, phase.table, rows, scale=scaling)
    return out[None], None


def store_prompt(
    pool: Any, layer: int, phase: Phase, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes a prompt's rows under the policy; what attention reads back."""
    if phase.policy.noise:
        k, v = (x * (1 + phase.policy.noise * torch.randn_like(x)) for x in (k, v))
    if phase.policy.kv == "bfp8":
        kept: tuple[torch.Tensor, torch.Tensor] = pool.write_prompt(layer, phase.slots, k, v)
        return kept
    if callable(phase.policy.kv):
        k, v = (phase.policy.kv(x.to(torch.float32)).to(x.dtype) for x in (k, v))
    pool.write_generated(layer, phase.slots, k, v)
    return k, v
