"""SGLang's own tokenized requests."""

from array import array
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

PLAIN = {
    **{"input_text": "", "input_embeds": None, "mm_inputs": None, "token_type_ids": None},
    **{"return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0},
    **{"token_ids_logprob": None, "stream": False, "bootstrap_host": "10.0.0.1"},
}


def tokenized(ids: Sequence[int], **fields: Any) -> TokenizedGenerateReqInput:
    given = {"rid": "r", "sampling_params": SamplingParams()} | PLAIN | fields
    return TokenizedGenerateReqInput(input_ids=array("q", ids), **given)
