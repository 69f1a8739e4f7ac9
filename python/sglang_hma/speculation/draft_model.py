"""SGLang's STANDALONE speculation (--speculative-algorithm STANDALONE): a small model drafts.

Its KV lies in a pool of its own under the target's page ids: the same slots, and in each page the
same format. So it has nothing to allocate, free or transfer, and a decode server computes its KV of
a prompt itself, whatever card computed the target's. KV that is missing or out of date gives bad
guesses and no wrong token.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.layers.moe.utils import draft_model_build_scope
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.runtime_context import get_parallel
from typing_extensions import override

from sglang_hma.prefill import phase
from sglang_hma.speculation import sampling
from sglang_hma.speculation.catching_up import PROMPT_TOKENS_A_STEP, shares, tokens_of
from sglang_hma.speculation.worker import ChainWorker


@dataclass
class Known:
    """Of one request: the draft model has the KV of its first `tokens` tokens, unless it was put
    aside since (`retractions`), which gave it other pages."""

    tokens: int
    retractions: int


class DraftModelWorker(ChainWorker):
    """Drafts what a small model says, greedily."""

    @override
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        with phase.weights_as_stored(), draft_model_build_scope():
            self._draft_worker = TpModelWorker(
                server_args=given["server_args"],
                gpu_id=given["gpu_id"],
                nccl_port=given["nccl_port"],
                is_draft_worker=True,
                context_length=self._runner.model_config.context_len,
            )
        self._drafter = self._draft_worker.model_runner
        self._known: WeakKeyDictionary[Any, Known] = WeakKeyDictionary()
        self._drafting: list[int] = []  # requests of this step that have drafts

    @override
    def alloc_memory_pool(
        self,
        memory_pool_config: Any = None,
        req_to_token_pool: Any = None,
        token_to_kv_pool_allocator: Any = None,
    ) -> None:
        super().alloc_memory_pool(memory_pool_config, req_to_token_pool, token_to_kv_pool_allocator)
        ours, target = self._drafter.token_to_kv_pool, self._runner.token_to_kv_pool
        if ours.num_pages != target.num_pages:
            raise RuntimeError(f"{ours.num_pages} pages for drafts, {target.num_pages} for text")
        ours.slab_is_bf16 = target.slab_is_bf16

    @override
    def init_cuda_graphs(self) -> None:
        self._draft_worker.init_cuda_graphs(capture_decode_cuda_graph=False)

    @override
    def weight_update_runners(self) -> list[tuple[str, Any]]:
        return [("draft", self._drafter)]

    @override
    def _draft_model_runners(self) -> tuple[Any, ...]:
        return (self._drafter,)

    @property
    @override
    def primary_draft_kv_pool(self) -> None:
        """None: no peer has or wants this pool's pages."""
        return None

    @override
    def clear_cache_pool(self) -> None:
        self._known.clear()

    def _drafted(self, batch: Any) -> torch.Tensor:
        last = torch.tensor([req.output_ids[-1] for req in batch.reqs], device=self._device)
        chain = last[:, None].repeat(1, self._width)
        lens = batch.seq_lens.tolist()
        gaps = [
            length + 1 - self._known_of(req).tokens
            for req, length in zip(batch.reqs, lens, strict=True)
        ]
        counts = shares(gaps, PROMPT_TOKENS_A_STEP)
        fed = [i for i, count in enumerate(counts) if count]
        guesses = dict(zip(fed, self._catch_up(batch, fed, counts), strict=True))
        most = sampling.most_said(batch.reqs, self._width)
        self._drafting = [i for i in fed if counts[i] == gaps[i] and most[i] > 1]
        if not self._drafting:
            return chain
        who = torch.tensor(self._drafting, device=self._device)
        chain[who, 1] = torch.stack([guesses[i] for i in self._drafting])
        rows, positions = batch.req_pool_indices[who], batch.seq_lens[who]
        for step in range(1, self._width - 1):
            chain[who, step + 1] = self._step(chain[who, step], rows, positions + step)
        return chain

    def _remember(self, batch: Any, targets: torch.Tensor, said: torch.Tensor) -> None:
        lens, counts = batch.seq_lens.tolist(), said.tolist()
        for i in self._drafting:  # a chain's last draft was not computed
            right = min(counts[i], self._width - 1)
            self._known_of(batch.reqs[i]).tokens = lens[i] + right

    def _known_of(self, req: Any) -> Known:
        known = self._known.get(req)
        if known is None or known.retractions != req.retraction_count:
            known = self._known[req] = Known(0, req.retraction_count)
        return known

    def _catch_up(self, batch: Any, fed: list[int], counts: list[int]) -> torch.Tensor:
        """Compute the next counts[i] tokens of each request i in `fed`, and return what the draft
        model says after the last of each: int64 [fed]."""
        spans = []
        for i in fed:
            known = self._known_of(batch.reqs[i])
            spans.append((known.tokens, known.tokens + counts[i]))
            known.tokens += counts[i]
        words = [
            token
            for i, span in zip(fed, spans, strict=True)
            for token in tokens_of(batch.reqs[i], *span)
        ]
        tokens = torch.tensor(words, dtype=torch.int64, device=self._device)
        rows = batch.req_pool_indices[torch.tensor(fed, device=self._device)]
        if len(tokens) == len(fed):
            starts = torch.tensor([start for start, _ in spans], device=self._device)
            return self._step(tokens, rows, starts)
        return self._extend(tokens, rows, spans)

    def _step(
        self, tokens: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """What follows each request's one token; all int64 [requests]."""
        return self._forward(ForwardMode.DECODE, tokens, rows, positions + 1, rows, positions)

    def _extend(
        self, tokens: torch.Tensor, rows: torch.Tensor, spans: list[tuple[int, int]]
    ) -> torch.Tensor:
        """What follows each request's tokens at positions start..end, which lie in `tokens` one
        request after the other."""
        counts = [end - start for start, end in spans]
        positions = torch.cat([torch.arange(*span) for span in spans]).to(self._device)
        ends = torch.tensor([end for _, end in spans], device=self._device)
        lens = torch.tensor(counts, dtype=torch.int32, device=self._device)
        return self._forward(
            ForwardMode.EXTEND,
            tokens,
            rows,
            ends,
            rows.repeat_interleave(lens.long()),
            positions,
            extend_num_tokens=len(tokens),
            extend_seq_lens=lens,
            extend_prefix_lens=ends.int() - lens,
            extend_start_loc=lens.cumsum(0, dtype=torch.int32) - lens,
            extend_seq_lens_cpu=counts,
            extend_prefix_lens_cpu=[start for start, _ in spans],
        )

    def _forward(
        self,
        mode: ForwardMode,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        token_rows: torch.Tensor,
        positions: torch.Tensor,
        **extend: Any,
    ) -> torch.Tensor:
        lens_cpu = seq_lens.cpu()
        slots = self.req_to_token_pool.req_to_token[token_rows, positions].long()
        forward = ForwardBatch(
            forward_mode=mode,
            batch_size=len(rows),
            input_ids=tokens,
            req_pool_indices=rows,
            seq_lens=seq_lens,
            seq_lens_cpu=lens_cpu,
            seq_lens_sum=int(lens_cpu.sum()),
            orig_seq_lens=seq_lens,
            out_cache_loc=slots,
            positions=positions.clamp(max=self._drafter.model_config.context_len - 1),
            spec_algorithm=self._drafter.spec_algorithm,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            **extend,
        )
        translator = self._drafter.kv_index_translator
        translator.own_plan(forward).bind(forward, translator)
        logits = self._drafter.forward(forward).logits_output.next_token_logits
        guesses: torch.Tensor = logits.argmax(-1)
        group = get_parallel().tp_group
        if group.world_size > 1:
            group.broadcast(guesses, src=0)
        return guesses
