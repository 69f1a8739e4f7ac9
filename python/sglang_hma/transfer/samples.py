"""Several samples of a prompt, as a pair serves them: each a request with a room of its own.

SGLang sends every sample of a prompt under the one room that the prompt has, and before them the
prompt itself once more. A room takes one request, so the others would wait for ever. Here a request
for n samples becomes one for n times as many prompts, in the order in which SGLang answers samples.
"""

from collections.abc import Callable
from typing import Any

ROOMS = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
# Of SGLang's GenerateReqInput, in lists of one entry a prompt once it is normalized.
PER_PROMPT = (
    *("rid", "text", "input_ids", "input_embeds", "image_data", "video_data", "audio_data"),
    *("mm_hashes", "mm_content_hashes", "modalities", "sampling_params", "watermark"),
    *("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob"),
    *("return_sampling_mask", "sampling_logprobs_mode", "return_hidden_states", "lora_path"),
    *("lora_id", "custom_logit_processor", "bootstrap_pair_key", "decode_tp_size", "extra_key"),
    *("cache_salt", "kv_hints", "multi_item_delimiter_indices", "token_indices_to_pool"),
)


def samples(obj: Any) -> int:
    """How many of each prompt; beams are sequences of one request."""
    given = obj.sampling_params
    params = given[0] if isinstance(given, list) and given else given
    if not isinstance(params, dict) or (params.get("beam_width") or 1) > 1:
        return 1
    return int(params.get("n") or 1)


def normalize(original: Callable[[Any], None], obj: Any, count: int) -> None:
    """GenerateReqInput.normalize_batch_and_arguments of `count` samples a prompt. Raises
    ValueError."""
    given = obj.sampling_params
    if isinstance(given, list) and any((params.get("n") or 1) != count for params in given):
        raise ValueError(f"n is not {count} for all prompts: send those with another n apart")
    rooms = {name: getattr(obj, name) for name in ROOMS}
    for name in ROOMS:
        setattr(obj, name, None)
    _as_batch(obj)
    plain = [params | {"n": 1} for params in (given if isinstance(given, list) else [given])]
    obj.sampling_params = plain if isinstance(given, list) else plain[0]
    original(obj)
    prompts = obj.batch_size
    for name in PER_PROMPT:
        value = getattr(obj, name)
        if isinstance(value, list) and len(value) == prompts:
            setattr(obj, name, [each for each in value for _ in range(count)])
    obj.rid = [f"{rid}_{index % count}" for index, rid in enumerate(obj.rid)]
    obj.sampling_params = [dict(params) for params in obj.sampling_params]
    obj.batch_size = prompts * count
    for name, value in rooms.items():
        setattr(obj, name, _each(name, value, obj.batch_size))


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One for each request. A single room is the first of as many, as SGLang has it of prompts."""
    if not isinstance(value, list):
        counts = name == "bootstrap_room" and isinstance(value, int)
        return [value + index if counts else value for index in range(count)]
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries, and this asks for {count} answers")
    return value


def _as_batch(obj: Any) -> None:
    """A single prompt as a list of one."""
    if isinstance(obj.text, str):
        obj.text = [obj.text]
    elif obj.text is None and obj.input_ids and isinstance(obj.input_ids[0], int):
        obj.input_ids = [obj.input_ids]
    elif obj.text is None and obj.input_ids is None and isinstance(obj.input_embeds[0][0], float):
        obj.input_embeds = [obj.input_embeds]
