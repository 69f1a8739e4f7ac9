"""SGLang's NGRAM speculation (--speculative-algorithm NGRAM) where its own worker cannot run.

Drafts come from SGLang's corpus of what was said before, on the host. Its worker verifies them as
trees, with kernels of sgl_kernel; here they are verified as chains, which decode attention reads
with a causal mask over their rows. Every token is one that decoding one at a time would say.
"""

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_device, get_parallel, get_schedule, get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.ngram_info import NgramVerifyInput
from typing_extensions import override

from sglang_hma.speculation import sampling
from sglang_hma.speculation.chain import chains, tokens_said
from sglang_hma.speculation.handover import nothing_said

logger = logging.getLogger(__name__)


class NgramWorker(BaseSpecWorker):
    """As SGLang's NGRAMWorker to its scheduler, without overlap."""

    @override
    def __init__(self, **given: Any) -> None:
        super().__init__()
        if not get_schedule().disable_overlap_schedule:
            raise ValueError("NGRAM needs --disable-overlap-schedule")
        self._target_worker = given["target_worker"]
        self._runner = self._target_worker.model_runner
        self._device = get_device().device
        spec = get_spec()
        self._width: int = spec.speculative_num_draft_tokens
        self._depth: int = spec.speculative_ngram_max_trie_depth
        self._matched: set[str] = set()  # requests of the last step, whose matches are kept
        self._corpus = make_corpus(spec, self._width)

    @property
    @override
    def draft_worker(self) -> None:
        return None

    @override
    def clear_cache_pool(self) -> None:
        self._corpus.reset()
        self._matched = set()

    # What SGLang's /add_external_corpus and its kin call.

    def add_external_corpus(self, corpus_id: str, token_chunks: list[list[int]]) -> int:
        return int(self._corpus.load_external_corpus_named(corpus_id, token_chunks))

    def commit_corpus_load(self, corpus_id: str, loaded_token_count: int) -> None:
        self._corpus.commit_external_corpus_load(corpus_id, loaded_token_count)

    def remove_external_corpus(self, corpus_id: str) -> None:
        self._corpus.remove_external_corpus(corpus_id)

    def list_external_corpora(self) -> dict[str, int]:
        return dict(self._corpus.list_external_corpora())

    def forward_batch_generation(
        self, batch: Any, on_publish: Any = None, pp_proxy_tensors: Any = None
    ) -> GenerationBatchResult:
        if not batch.forward_mode.is_decode():
            result = self.target_worker.forward_batch_generation(batch)
            result.new_seq_lens = batch.seq_lens.clone()
            result.next_draft_input = nothing_said(len(batch.reqs), self._width, batch.seq_lens)
            result.accept_lens = result.next_draft_input.accept_lens
            result.speculative_num_draft_tokens = self._width
            return result
        chain = self._drafted(batch)
        positions = self._place(batch, chain)
        result = self.target_worker.forward_batch_generation(batch, is_verify=True)
        targets = self._sampled(batch, result.logits_output, positions)
        most = torch.tensor(sampling.most_said(batch.reqs, self._width), device=self._device)
        said = tokens_said(chain, targets, most)
        self._remember(batch, targets, said)
        batch.forward_mode = ForwardMode.DECODE
        accepted = targets.flatten().to(torch.int32)
        result.next_token_ids, result.accept_lens = accepted, said.to(torch.int32)
        result.new_seq_lens = batch.seq_lens + said
        result.speculative_num_draft_tokens = self._width
        result.next_draft_input = NgramVerifyInput(
            draft_token_num=self._width,
            new_seq_lens=result.new_seq_lens,
            accept_tokens=accepted,
            accept_lens=result.accept_lens,
        )
        return result

    def _drafted(self, batch: Any) -> torch.Tensor:
        """Each request's last token and what may follow it: int64 [requests, width]."""
        self._corpus.synchronize()
        tokens, sees = self._corpus.batch_get(
            [req.rid for req in batch.reqs],
            [self._tail(req) for req in batch.reqs],
            [len(req.origin_input_ids_unpadded) + len(req.output_ids) for req in batch.reqs],
        )
        return torch.from_numpy(chains(tokens, sees, self._width)).to(self._device)

    def _tail(self, req: Any, *said: int) -> list[int]:
        """The last tokens of a request, as many as the corpus may match."""
        output = [*req.output_ids[-self._depth :], *said][-self._depth :]
        missing = self._depth - len(output)
        return [*(req.origin_input_ids_unpadded[-missing:] if missing else ()), *output]

    def _place(self, batch: Any, chain: torch.Tensor) -> torch.Tensor:
        """Make of `batch` a forward over the chains; their positions int64 [requests * width]."""
        ahead = torch.arange(self._width, device=self._device)
        positions = batch.seq_lens[:, None] + ahead
        table = batch.req_to_token_pool.req_to_token
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = chain.flatten()
        batch.out_cache_loc = table[batch.req_pool_indices[:, None], positions].flatten().long()
        batch.spec_info = NgramVerifyInput(
            draft_token=batch.input_ids,
            custom_mask=torch.empty(0, dtype=torch.bool, device=self._device),
            positions=positions.flatten(),
            draft_token_num=self._width,
        )
        return positions.flatten()

    def _sampled(self, batch: Any, logits_output: Any, positions: torch.Tensor) -> torch.Tensor:
        targets = sampling.sample(self._runner, batch, logits_output, positions)
        group = get_parallel().tp_group
        if group.world_size > 1:  # ranks may differ in a last bit, and must say the same
            group.broadcast(targets, src=0)
        return targets

    def _remember(self, batch: Any, targets: torch.Tensor, said: torch.Tensor) -> None:
        lines = zip(batch.reqs, targets.tolist(), said.tolist(), strict=True)
        self._corpus.batch_put([self._tail(req, *row[:count]) for req, row, count in lines])
        now = {req.rid for req in batch.reqs}
        if gone := self._matched - now:
            self._corpus.erase_match_state(list(gone))
        self._matched = now


def make_corpus(spec: Any, width: int) -> Any:
    """SGLang's NgramCorpus; it compiles it (C++) at the first start on a machine."""
    if shutil.which("ninja") is None:  # one may be installed beside this Python
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus

    logger.info("NGRAM: loading the corpus, which is compiled at the first start")
    return NgramCorpus(
        min_bfs_breadth=spec.speculative_ngram_min_bfs_breadth,
        max_bfs_breadth=spec.speculative_ngram_max_bfs_breadth,
        match_type=spec.speculative_ngram_match_type,
        capacity=spec.speculative_ngram_capacity,
        max_trie_depth=spec.speculative_ngram_max_trie_depth,
        draft_token_num=width,
        external_sam_budget=spec.speculative_ngram_external_sam_budget,
        external_corpus_max_tokens=spec.speculative_ngram_external_corpus_max_tokens,
    )
