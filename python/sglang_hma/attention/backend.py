"""SGLang's attention backend `hma`: plans a batch, then calls hma_kernels."""

import logging
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from typing_extensions import override

from hma_kernels import DecodePlan, PageTable, describe, extend_attention
from sglang_hma.attention.layers import layers_of
from sglang_hma.kvcache.pool import Bfp8KVPool, MixedKVPool
from sglang_hma.prefill import phase

BACKEND_NAME = "hma"

logger = logging.getLogger(__name__)


class HmaAttnBackend(AttentionBackend):
    """Reads BFP8 and BF16 pages as they lie; nothing is unpacked into the cache."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        try:
            self.parts, self.where = layers_of(self.token_to_kv_pool)
        except RuntimeError as error:
            raise RuntimeError(
                f"--attention-backend {BACKEND_NAME} reads BFP8 pages, but {error}"
            ) from None
        self.pool: Bfp8KVPool = self.parts[0].pool
        logger.info("Attention backend %s, %s", BACKEND_NAME, describe(self.pool.kv.device))
        # A draft model has one set of weights, and leaves the target's as they are.
        self.weights = phase.PhaseWeights() if runner.is_draft_worker else phase.weights
        self.q_indptr: torch.Tensor | None = None

    @property
    def forward_metadata(self) -> PageTable | None:
        """SGLang keeps it beside a CUDA graph, and drops it where there is nothing to do."""
        return self.parts[0].table

    @forward_metadata.setter
    def forward_metadata(self, table: PageTable | None) -> None:
        self.parts[0].table = table

    @override
    def support_triton(self) -> bool:
        return False

    @override
    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    @override
    def init_forward_metadata(self, forward_batch: Any) -> None:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        generates = mode.is_decode() or mode.is_target_verify()
        self.weights.enter(prefill=not generates)
        rows = forward_batch.req_pool_indices
        self.q_indptr, seq_lens = None, forward_batch.seq_lens
        if mode.is_target_verify():
            chain = forward_batch.spec_info.draft_token_num
            seq_lens = seq_lens + chain
            self.q_indptr = torch.arange(len(rows) + 1) * chain
        elif not generates:
            seq_lens = forward_batch.extend_prefix_lens
            lens = torch.tensor([0, *forward_batch.extend_seq_lens_cpu], dtype=torch.int64)
            self.q_indptr = lens.cumsum(0)
        for part in self.parts:
            part.begin(self.req_to_token_pool.req_to_token, rows, seq_lens)

    @override
    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        from hma_kernels.triton.page_table import StaticPageTables

        assert isinstance(self.pool, MixedKVPool), "a prefill server does not decode"
        assert len(self.parts) == 1, "two pools were not tried with CUDA graphs"
        slots = self.req_to_token_pool.req_to_token
        self.graph_tables = StaticPageTables(
            slots, self.pool.slab_is_bf16, max_batch=max_bs, max_tokens=slots.shape[1]
        )
        self.graph_plans: dict[int, dict[tuple[int, int], DecodePlan]] = {}

    @override
    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a CUDA graph is captured or replayed; plans of one batch size share its table."""
        self.weights.enter(prefill=False)
        rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        (part,) = self.parts
        part.table, self.q_indptr = self.graph_tables.fill(rows, seq_lens), None
        part.plans = self.graph_plans.setdefault(len(rows), {})
        for plan in part.plans.values():
            plan.refresh()

    @override
    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        require_plain(layer, kwargs)
        part, number = self.where[layer.layer_id]
        assert isinstance(part.pool, MixedKVPool), "a prefill server does not decode"
        k, v = require_own_kv(layer, k, v)
        if save_kv_cache:
            slots = part.slots(forward_batch.out_cache_loc)
            part.pool.write_generated(number + part.pool.start_layer, slots, k, v)
        key = (layer.tp_q_head_num, layer.sliding_window_size)
        if key not in part.plans:
            assert part.table is not None
            part.plans[key] = DecodePlan(
                part.pool.kv,
                part.table,
                num_q_heads=layer.tp_q_head_num,
                sliding_window=layer.sliding_window_size,
                q_indptr=self.q_indptr,
            )
        out = part.plans[key].run(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            number,
            scale=layer.scaling,
            logit_cap=layer.logit_cap,
            sinks=sinks,
        )
        return out.reshape(q.shape[0], -1)

    @override
    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        require_plain(layer, kwargs)
        if forward_batch.forward_mode.is_target_verify():
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, sinks)
        k, v = require_own_kv(layer, k, v)
        if not save_kv_cache:
            raise NotImplementedError("prefill without writing the KV cache")
        part, number = self.where[layer.layer_id]
        part.pool.wait_for_layer(number + part.pool.start_layer)
        slots = part.slots(forward_batch.out_cache_loc)
        k, v = part.pool.write_prompt(number + part.pool.start_layer, slots, k, v)
        assert part.table is not None and self.q_indptr is not None
        out = extend_attention(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k,
            v,
            part.pool.kv,
            number,
            part.table,
            self.q_indptr,
            scale=layer.scaling,
            logit_cap=layer.logit_cap,
            sliding_window=layer.sliding_window_size,
            sinks=sinks,
        )
        return out.reshape(q.shape[0], -1)


def require_plain(layer: Any, kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError for attention that would be computed as something else.

    Models with plain attention pass no further arguments, or None; each one that is set changes the
    result: rel_bias, score_mod, idx_q ...
    """
    asked = [name for name, value in kwargs.items() if value is not None]
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        asked.append(f"logit_capping_method={layer.logit_capping_method}")
    if layer.pos_encoding_mode != "NONE":
        asked.append(f"pos_encoding_mode={layer.pos_encoding_mode}")
    if (layer.xai_temperature_len or 0) > 0:
        asked.append(f"xai_temperature_len={layer.xai_temperature_len}")
    if layer.use_irope:
        asked.append("use_irope")
    if asked:
        raise NotImplementedError(
            f"layer {layer.layer_id} asks attention for {', '.join(asked)}, which the backend "
            f"{BACKEND_NAME} does not compute; serve this model with --hma-kv-format native"
        )


def require_own_kv(
    layer: Any, k: torch.Tensor | None, v: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as [tokens, kv_heads, dim]; raises for layers that are not plain self-attention."""
    plain = layer.attn_type == AttentionType.DECODER and not layer.is_cross_attention
    if k is None or v is None or not plain:
        raise NotImplementedError(
            f"layer {layer.layer_id} is no causal self-attention with its own K and V; "
            "serve this model with --hma-kv-format native"
        )
    return (
        k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
        v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
    )
