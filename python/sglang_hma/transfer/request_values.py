"""Values in a client's request that SGLang passes on and a process of its server ends on.

A scheduler looks token ids up and makes tensors of what a request says, without a check: an
exception there ends the server, with all other requests. So they are checked in the HTTP process,
where a ValueError is answered with HTTP 400.
"""

import types
import typing
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any, cast

import msgspec

from sglang_hma.transfer import samples
from sglang_hma.transfer.request_fields import shown

# Of one prompt. SGLang makes lists as long as a client says before it looks at anything else.
MAX_SAMPLES = 1024
MAX_INT32 = (1 << 31) - 1
# float32's range is left where logits are divided by the one or the other is added to them.
MIN_PENALTY, MAX_BIAS = 1e-6, 1e6
# SGLang's own of SamplingParams: with the first a client's values would not be looked at.
PRIVATE = ("is_normalized", "stop_str_max_len", "stop_regex_max_len")


def normalize(original: Any, obj: Any) -> Any:
    """Around GenerateReqInput.normalize_batch_and_arguments. Raises ValueError."""
    if getattr(obj, "lora_id", None) is not None:
        raise ValueError("lora_id is given, which the server sets: name an adapter by lora_path")
    given = obj.sampling_params
    for params in given if isinstance(given, list) else [given]:
        if params is not None and (reason := refuse_samples(params)):
            raise ValueError(reason)
    if obj.bootstrap_room is None:
        return original(obj)
    if reason := refuse_of_a_pair(obj):
        raise ValueError(reason)
    count = samples.samples(obj)
    if count > 1:
        return samples.normalize(original, obj, count)
    return original(obj)


def refuse_of_a_pair(obj: Any) -> str | None:
    """Why a request is refused of which SGLang would serve a part, or None."""
    given = obj.sampling_params
    for params in given if isinstance(given, list) else [given]:
        beams = params.get("beam_width") if isinstance(params, dict) else None
        if beams is not None and beams != 1:
            return f"beam_width is {shown(beams)}: prefill and decode servers have no beam search"
    if obj.return_hidden_states:
        return (
            "return_hidden_states is given: decode has none of the prompt's, which prefill computes"
        )
    return None


def refuse_samples(params: object) -> str | None:
    """Why the sampling parameters of a prompt are refused before anything is made of them."""
    if not isinstance(params, dict):
        return f"sampling_params is {shown(params)}, not an object"
    samples = params.get("n", 1)
    if samples is not None and not (type(samples) is int and 1 <= samples <= MAX_SAMPLES):
        return f"n is {shown(samples)}, not a number of samples from 1 to {MAX_SAMPLES}"
    given = [name for name in PRIVATE if name in params]
    return f"{given[0]} is given, which is no sampling parameter" if given else None


def create_tokenized_object(
    original: Any,
    manager: Any,
    obj: Any,
    input_text: Any,
    input_ids: Any,
    input_embeds: Any = None,
    mm_inputs: Any = None,
    token_type_ids: Any = None,
) -> Any:
    """Around TokenizerManager._create_tokenized_object, from which everything goes to the
    scheduler. Raises ValueError."""
    from sglang.srt.runtime_context import get_disagg, get_observability

    allowed = get_observability().tokenizer_metrics_allowed_custom_labels
    labels = getattr(obj, "custom_labels", None)
    if (reason := refuse_labels(labels, frozenset(allowed or ()))) is not None:
        raise ValueError(reason)
    made = original(manager, obj, input_text, input_ids, input_embeds, mm_inputs, token_type_ids)
    role = get_disagg().disaggregation_mode
    of_ids = role != "null" or (input_embeds is None and mm_inputs is None)
    reason = refuse(made, manager.model_config.vocab_size, of_ids)
    if reason is None and role == "prefill":
        reason = refuse_prefill_rank(made, manager.elastic_worker_count)
    if reason is not None:
        raise ValueError(reason)
    return made


@cache
def scalars(declared: type) -> Mapping[str, Any]:
    """The fields of a class of SGLang's that hold one plain value each, with their types."""
    hints = typing.get_type_hints(declared)
    return {name: hint for name, hint in hints.items() if _is_scalar(hint)}


def _is_scalar(hint: Any) -> bool:
    kind = typing.get_origin(hint)
    if kind in (typing.Union, types.UnionType):
        return all(map(_is_scalar, typing.get_args(hint)))
    return kind is typing.Literal or hint in (bool, int, float, str, type(None))


def refuse_types(made: Any) -> str | None:
    """Why a tokenized request is refused, or None: a field for one value has another kind of it.

    SGLang takes a list where a client may send several prompts, and for a single one passes some
    on as they are, though its class for the scheduler says otherwise.
    """
    for name, hint in scalars(cast(Hashable, type(made))).items():
        value = getattr(made, name)
        if value is None:
            continue
        try:
            msgspec.convert(value, hint)
        except msgspec.ValidationError as error:
            return f"{name} is {shown(value)}: {error}"
    return None


def refuse_labels(labels: object, allowed: frozenset[str]) -> str | None:
    """Why a request's metric labels are refused, or None: prometheus raises for one that it has not
    been told of, in the HTTP process's loop over all answers."""
    if labels is None:
        return None
    if not isinstance(labels, dict):
        return f"custom_labels is {shown(labels)}, not an object"
    unknown = sorted(labels.keys() - allowed)
    if unknown:
        return (
            f"custom_labels has {shown(unknown[0])}, which "
            "--tokenizer-metrics-allowed-custom-labels does not"
        )
    return None


def refuse(made: Any, vocabulary: int, of_ids: bool = True) -> str | None:
    """Why a tokenized request of SGLang's is refused, or None. `vocabulary`: tokens. `of_ids`: the
    prompt is token ids and nothing else, as prefill and decode servers have it."""
    if reason := refuse_types(made):
        return reason
    if isinstance(getattr(made, "positional_embed_overrides", None), dict):
        return "positional_embed_overrides is given: no JSON says what it takes"
    if of_ids and (reason := _refuse_prompt(made, vocabulary)):
        return reason
    if hasattr(made, "logprob_start_len"):
        return _refuse_returned(made, vocabulary) or _refuse_sampling(
            made.sampling_params, vocabulary
        )
    return None


def _refuse_prompt(made: Any, vocabulary: int) -> str | None:
    for name in ("input_embeds", "positional_embed_overrides"):
        if getattr(made, name, None) is not None:
            return f"{name} is given: prefill and decode servers take text or input_ids"
    ids = made.input_ids
    if ids is None or not len(ids):
        return "the prompt has no token: give at least one"
    if not (min(ids) >= 0 and max(ids) < vocabulary):
        wrong = next(one for one in ids if not 0 <= one < vocabulary)
        return f"input_ids has {wrong}, and the vocabulary's ids are from 0 to {vocabulary - 1}"
    return None


def refuse_prefill_rank(made: Any, ranks: int) -> str | None:
    """Why a tokenized request is refused by a prefill server with so many data-parallel ranks, or
    None. Decode refuses the same when it knows the server (DecodeManager.refuse_rank); a half that
    only one refuses would wait for the other, and the router with it."""
    rank = getattr(made, "disagg_prefill_dp_rank", None)
    if rank is None or 0 <= rank < ranks:
        return None
    return f"disagg_prefill_dp_rank is {rank}, and this prefill server's ranks are 0 to {ranks - 1}"


def _refuse_returned(made: Any, vocabulary: int) -> str | None:
    number, start = made.top_logprobs_num, made.logprob_start_len
    if number is None or not 0 <= number <= vocabulary:
        return f"top_logprobs_num is {shown(number)}, not a number from 0 to {vocabulary}"
    if start is None or not -1 <= start <= MAX_INT32:
        return f"logprob_start_len is {shown(start)}: give a position in the prompt, or -1"
    return None


def _refuse_sampling(params: Any, vocabulary: int) -> str | None:
    for name in ("max_new_tokens", "min_new_tokens", "top_k"):
        value = getattr(params, name)
        if value is not None and not (type(value) is int and -1 <= value <= MAX_INT32):
            return f"{name} is {shown(value)}, not a whole number up to 2^31 - 1"
    if not params.repetition_penalty >= MIN_PENALTY:
        return f"repetition_penalty is {params.repetition_penalty}, below {MIN_PENALTY}"
    for token, bias in (params.logit_bias or {}).items():
        if not abs(bias) <= MAX_BIAS:
            return f"logit_bias of token {shown(token)} is {shown(bias)}: give up to {MAX_BIAS:g}"
    wrong = [one for one in params.stop_token_ids or () if not 0 <= one < vocabulary]
    if wrong:
        return (
            f"stop_token_ids has {shown(wrong[0])}, and the vocabulary's ids are from 0 to "
            f"{vocabulary - 1}"
        )
    return None
