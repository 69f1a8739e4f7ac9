"""What each row of a chain is sampled with."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_hma.speculation.sampling import most_said, of_rows

REQUESTS, WIDTH, VOCABULARY = 3, 4, 11


def test_rows_have_their_requests_parameters() -> None:
    given = {
        name: torch.rand(REQUESTS, 1)
        for name in ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed")
    }
    tables = {
        name: torch.rand(REQUESTS, VOCABULARY)
        for name in ("logit_bias", "acc_additive_penalties", "acc_scaling_penalties")
    }
    grammars = ["a", None, "b"]
    info = SamplingBatchInfo(
        **given,
        **tables,
        is_all_greedy=False,
        is_any_greedy=True,
        need_top_p_sampling=True,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        vocab_size=VOCABULARY,
        grammars=grammars,
    )
    rows = of_rows(info, WIDTH)
    for name, values in (given | tables).items():
        for row in range(REQUESTS * WIDTH):
            assert torch.equal(getattr(rows, name)[row], values[row // WIDTH]), name
    assert rows.grammars == ["a", *[None] * 7, "b", *[None] * 3]
    assert (rows.is_all_greedy, rows.need_top_p_sampling) == (False, True)
    assert len(info.temperatures) == REQUESTS


@pytest.mark.parametrize(
    ("params", "said", "most"),
    [
        ({}, 0, WIDTH),
        ({"temperature": 0.7, "top_p": 0.5}, 3, WIDTH),
        ({"frequency_penalty": 0.1}, 0, 1),
        ({"presence_penalty": -0.1}, 0, 1),
        ({"repetition_penalty": 1.2}, 0, 1),
        ({"min_new_tokens": 3}, 2, 1),
        ({"min_new_tokens": 3}, 3, WIDTH),
    ],
)
def test_how_many_tokens_a_request_may_say(params: dict, said: int, most: int) -> None:
    req = SimpleNamespace(
        grammar=None,
        custom_logit_processor=None,
        sampling_params=SamplingParams(**params),
        output_ids=[0] * said,
    )
    assert most_said([req], WIDTH) == [most]
    req.grammar = object()
    assert most_said([req], WIDTH) == [1]
