"""One step of speculation: a chain of drafts for each request, verified in one forward.

Where SGLang's own workers verify trees, with kernels of sgl_kernel, here chains are verified, which
decode attention reads with a causal mask over their rows. Every token is one that decoding one at a
time would say; who drafts decides only how many are said in a step.
"""

from abc import abstractmethod
from typing import Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_device, get_parallel, get_schedule, get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.ngram_info import NgramVerifyInput
from typing_extensions import override

from sglang_hma.speculation import sampling
from sglang_hma.speculation.chain import tokens_said
from sglang_hma.speculation.handover import nothing_said


class ChainWorker(BaseSpecWorker):
    """As SGLang's NGRAMWorker to its scheduler, without overlap."""

    @override
    def __init__(self, **given: Any) -> None:
        super().__init__()
        spec = get_spec()
        if not get_schedule().disable_overlap_schedule:
            raise ValueError(f"{spec.speculative_algorithm} needs --disable-overlap-schedule")
        self._target_worker = given["target_worker"]
        self._runner = self._target_worker.model_runner
        self._device = get_device().device
        self._width: int = spec.speculative_num_draft_tokens

    @abstractmethod
    def _drafted(self, batch: Any) -> torch.Tensor:
        """Each request's last token and what may follow it: int64 [requests, width]."""

    @abstractmethod
    def _remember(self, batch: Any, targets: torch.Tensor, said: torch.Tensor) -> None:
        """Of `targets` [requests, width], what the model says after each token of the chains,
        request i says the first said[i]."""

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

    def _place(self, batch: Any, chain: torch.Tensor) -> torch.Tensor:
        """Make of `batch` a forward over the chains; their positions int64 [requests * width].

        A chain may reach over the end of the context, where nothing is said any more and models
        with an embedding of each position have none.
        """
        ahead = torch.arange(self._width, device=self._device)
        positions = batch.seq_lens[:, None] + ahead
        table = batch.req_to_token_pool.req_to_token
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = chain.flatten()
        batch.out_cache_loc = table[batch.req_pool_indices[:, None], positions].flatten().long()
        positions = positions.clamp(max=self._runner.model_config.context_len - 1)
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
