"""What a client may write into a request, in SGLang's own classes."""

from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_hma.transfer.request_values import (
    MAX_SAMPLES,
    normalize,
    refuse,
    refuse_labels,
    refuse_prefill_rank,
    scalars,
)

from .tokenized import tokenized

VOCABULARY = 4096


def refusal(*, ids: list[int] | None = None, sampling: Any = None, **fields: Any) -> str | None:
    params = SamplingParams(**{"temperature": 1} | (sampling or {}))
    made = tokenized([1, 4095] if ids is None else ids, sampling_params=params)
    for name, value in fields.items():
        setattr(made, name, value)
    return refuse(made, VOCABULARY)


def test_what_is_common_is_taken() -> None:
    assert refusal() is None
    assert refusal(sampling={"top_k": -1, "stop_token_ids": [2, 0], "max_new_tokens": 0}) is None
    assert refusal(logprob_start_len=0, top_logprobs_num=VOCABULARY) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ids": [1, 4096]}, "input_ids has 4096"),
        ({"ids": []}, "the prompt has no token"),
        ({"ids": [-1]}, "input_ids has -1"),
        ({"top_logprobs_num": 4097}, "top_logprobs_num is 4097"),
        ({"top_logprobs_num": -1}, "top_logprobs_num is -1"),
        ({"logprob_start_len": -2}, "logprob_start_len is -2"),
        ({"logprob_start_len": 2**31}, "logprob_start_len is 2147483648"),
        ({"positional_embed_overrides": {"a": 1}}, "positional_embed_overrides is given"),
        ({"return_hidden_states": []}, "return_hidden_states is []"),
        ({"return_hidden_states": "all"}, "return_hidden_states is 'all'"),
        ({"sampling": {"repetition_penalty": 1e-320}}, "repetition_penalty is 1e-320"),
        ({"sampling": {"repetition_penalty": float("nan")}}, "repetition_penalty is nan"),
        ({"sampling": {"logit_bias": {"5": 1e308}}}, "logit_bias of token '5' is 1e+308"),
        ({"sampling": {"logit_bias": {"5": float("-inf")}}}, "logit_bias of token '5' is -inf"),
        ({"input_embeds": [[0.5]]}, "input_embeds is given"),
        ({"sampling": {"top_k": 2**31}}, "top_k is 2147483648"),
        ({"sampling": {"max_new_tokens": 2**40}}, "max_new_tokens is 1099511627776"),
        ({"sampling": {"stop_token_ids": [4096]}}, "stop_token_ids has 4096"),
        ({"sampling": {"stop_token_ids": [2**70]}}, "stop_token_ids has 1180591620717411303424"),
    ],
)
def test_what_ends_a_scheduler_is_refused(fields: dict[str, Any], words: str) -> None:
    reason = refusal(**fields)
    assert reason is not None and words in reason and "\n" not in reason


@pytest.mark.parametrize("samples", [0, -1, MAX_SAMPLES + 1, 2**31, 10**30, 1.5, "2", True])
def test_samples_are_counted_before_lists_are_made(samples: Any) -> None:
    for params in ({"n": samples}, [{"n": samples}]):
        obj = GenerateReqInput(input_ids=[1], sampling_params=params)
        with pytest.raises(ValueError, match="n is "):
            normalize(lambda _: pytest.fail("too late"), obj)


def test_a_number_of_samples_is_taken() -> None:
    for params in (None, {}, {"n": None}, {"n": 1}, {"n": MAX_SAMPLES}):
        normalize(lambda obj: obj, GenerateReqInput(input_ids=[1], sampling_params=params))


@pytest.mark.parametrize("name", ["is_normalized", "stop_str_max_len", "stop_regex_max_len"])
def test_a_client_does_not_skip_the_checks(name: str) -> None:
    obj = GenerateReqInput(input_ids=[1], sampling_params={name: 1})
    with pytest.raises(ValueError, match=f"{name} is given"):
        normalize(lambda _: pytest.fail("too late"), obj)


def test_labels_that_the_metrics_do_not_have_are_refused() -> None:
    allowed = frozenset(("tenant",))
    assert refuse_labels(None, allowed) is None
    assert refuse_labels({"tenant": "a"}, allowed) is None
    for labels in ({"": ""}, {"tenant": "a", "other": "b"}, [{"tenant": "a"}]):
        assert "custom_labels" in (refuse_labels(labels, allowed) or "")


def test_a_rank_that_prefill_does_not_have_is_refused() -> None:
    """Decode refused it at once, prefill waited 45 s for decode, the router tried five times."""
    for ranks in (1, 4):
        for rank in (None, 0, ranks - 1):
            made = tokenized([1], disagg_prefill_dp_rank=rank)
            assert refuse_prefill_rank(made, ranks) is None
        for rank in (-1, ranks, 2**62):
            made = tokenized([1], disagg_prefill_dp_rank=rank)
            assert "disagg_prefill_dp_rank" in (refuse_prefill_rank(made, ranks) or "")


@pytest.mark.parametrize("value", ["x", ["x"], [None], 5])
def test_an_adapter_is_named_by_its_path_alone(value: Any) -> None:
    """SGLang puts its own number of an adapter there; a list ended both schedulers."""
    obj = GenerateReqInput(input_ids=[1], sampling_params={}, lora_id=value)
    with pytest.raises(ValueError, match="lora_id is given"):
        normalize(lambda _: pytest.fail("too late"), obj)


@pytest.mark.parametrize("name", sorted(scalars(TokenizedGenerateReqInput)))
def test_no_list_goes_where_the_scheduler_takes_one_value(name: str) -> None:
    for wrong in (["x"], [[1]], {"a": 1}):
        reason = refusal(**{name: wrong})
        assert reason is not None and f"{name} is " in reason and "\n" not in reason


def test_every_field_that_a_client_may_make_a_list_is_looked_at() -> None:
    """Those that are checked as what they are, or never reach the scheduler as they came, aside."""
    looked_at = scalars(TokenizedGenerateReqInput)
    assert {"lora_id", "extra_key", "cache_salt", "custom_logit_processor"} <= looked_at.keys()
