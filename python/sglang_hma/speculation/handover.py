"""Requests whose prompts a prefill server has computed begin to draft.

SGLang 0.5.23 has no first drafts for NGRAM or STANDALONE on a decode server: its relay would fail
on them.
"""

from collections.abc import Callable
from typing import Any

import torch


def nothing_said(requests: int, width: int, seq_lens: torch.Tensor) -> Any:
    """SGLang's NgramVerifyInput before a first verification."""
    from sglang.srt.speculative.ngram_info import NgramVerifyInput

    tokens = seq_lens.new_zeros(requests * width, dtype=torch.int32)
    return NgramVerifyInput(
        draft_token_num=width,
        new_seq_lens=seq_lens,
        accept_tokens=tokens,
        accept_lens=seq_lens.new_ones(requests, dtype=torch.int32),
    )


def build_disagg_draft_input(
    original: Callable[..., Any], algorithm: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around SpeculativeAlgorithm.build_disagg_draft_input."""
    if not (algorithm.is_ngram() or algorithm.is_standalone()):
        return original(algorithm, batch, *args, **kwargs)
    from sglang.srt.runtime_context import get_spec

    width = get_spec().speculative_num_draft_tokens
    return nothing_said(len(batch.reqs), width, batch.seq_lens)
