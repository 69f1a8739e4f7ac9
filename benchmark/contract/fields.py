"""Every field of a request, with a value whose effect can be seen in the answer."""

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any

IDS = [4, 77, 1500, 901, 33, 2048, 17, 640, 1201, 90]
TEXT = "def add(a, b): return"
SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
DRAWN = {"temperature": 1.0, "sampling_seed": 5}
USER = [{"role": "user", "content": "hello"}]
TOKEN = 17
BIAS = {str(TOKEN): 100.0}
# Of eight as likely ones, another one after a penalty for the first.
EIGHT = {"logit_bias": {str(TOKEN + index): 100.0 for index in range(8)}}
JSON_SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}'
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [12345]}}}
TAG = {
    "type": "structural_tag",
    "format": {"type": "regex", "pattern": "[0-9]{6}"},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GIVEN_ID = "given-by-the-client"


@dataclass(frozen=True)
class Case:
    """One field with `value`, in a request that also has `beside`, which the request that it is
    compared with has too."""

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Api:
    """Requests of one kind: `under` is where the fields stand, None for the request itself."""

    name: str
    path: str
    base: dict[str, Any]
    cases: dict[str, Case]
    under: str | None = None

    def body(self, case: Case, name: str | None = None) -> dict[str, Any]:
        fields = case.beside | ({name: case.value} if name else {})
        if self.under is None:
            return self.base | fields
        return self.base | {self.under: self.base[self.under] | fields}


LOGPROBS = {"return_logprob": True}
GENERATE = {
    "rid": Case(GIVEN_ID),
    "session_id": Case("s"),
    "text": Case(TEXT, {"input_ids": None}),
    "input_ids": Case([9, 8, 7]),
    "input_embeds": Case([[0.5] * 8], {"input_ids": None}),
    "image_data": Case("x"),
    "video_data": Case("x"),
    "audio_data": Case("x"),
    "mm_hashes": Case(["1"]),
    "mm_content_hashes": Case(["1"]),
    "use_audio_in_video": Case(True),
    "video_config": Case({"fps": 1}),
    "sampling_params": Case(SAMPLING | {"max_new_tokens": 3}),
    "watermark": Case({"enabled": True}),
    "return_logprob": Case(True),
    "logprob_start_len": Case(2, LOGPROBS),
    "top_logprobs_num": Case(3, LOGPROBS),
    "token_ids_logprob": Case([5, 6], LOGPROBS),
    "return_sampling_mask": Case(True),
    "sampling_logprobs_mode": Case("support"),
    "return_text_in_logprobs": Case(True, LOGPROBS),
    "return_flat_raw_top_logprobs": Case(True, LOGPROBS | {"top_logprobs_num": 2}),
    "return_flat_raw_output_top_logprobs": Case(True, LOGPROBS | {"top_logprobs_num": 2}),
    "stream": Case(True),
    "log_metrics": Case(False),
    "return_hidden_states": Case(True),
    "return_routed_experts": Case(True),
    "routed_experts_start_len": Case(1),
    "return_indexer_topk": Case(True),
    "modalities": Case(["image"]),
    "session_params": Case({"id": "s"}),
    "lora_path": Case("a"),
    "lora_id": Case("a"),
    "custom_logit_processor": Case("{}"),
    "positional_embed_overrides": Case({"a": 1}),
    "bootstrap_host": Case("h"),
    "bootstrap_port": Case(1),
    "bootstrap_room": Case(1),
    "bootstrap_pair_key": Case("k"),
    "decode_tp_size": Case(1),
    "routed_dp_rank": Case(0),
    "data_parallel_rank": Case(0),
    "disagg_prefill_dp_rank": Case(0),
    "routing_key": Case("k"),
    "conversation_id": Case("c"),
    "http_worker_ipc": Case("x"),
    "background": Case(False),
    "cache_salt": Case("k"),
    "kv_hints": Case({}),
    "return_flat_raw_top_logprobs_b64": Case(
        True, LOGPROBS | {"top_logprobs_num": 2, "return_flat_raw_top_logprobs": True}
    ),
    "require_reasoning": Case(True),
    "max_thinking_tokens": Case(3),
    "priority": Case(3),
    "extra_key": Case("k"),
    "no_logs": Case(True),
    "custom_labels": Case({"a": "b"}),
    "return_bytes": Case(True),
    "return_entropy": Case(True),
    "return_prompt_token_ids": Case(True),
    "external_trace_header": Case({"a": "b"}),
    "received_time": Case(1.0),
    "need_wait_for_mm_inputs": Case(False),
    "num_items_assigned": Case({}),
    "encoder_urls": Case([]),
    "max_dynamic_patch": Case(1),
    "min_dynamic_patch": Case(1),
    "image_max_dynamic_patch": Case(1),
    "video_max_dynamic_patch": Case(1),
    "images_config": Case({}),
    "mm_processor_kwargs": Case({}),
    "multi_item_delimiter_indices": Case([1]),
    "token_indices_to_pool": Case([1]),
}
STOPS = {"logit_bias": BIAS, "ignore_eos": False}
PARAMS = {
    "max_new_tokens": Case(3),
    "stop": Case(["a", "e", "i", "o"], {"ignore_eos": False}),
    "stop_token_ids": Case([TOKEN], STOPS),
    "stop_regex": Case("[a-z]{2}", {"ignore_eos": False}),
    "temperature": Case(0.7, {"temperature": 1.5, "sampling_seed": 5}),
    "top_p": Case(0.001, DRAWN),
    "top_k": Case(1, DRAWN),
    "min_p": Case(0.99, DRAWN),
    "frequency_penalty": Case(2.0, EIGHT),
    "presence_penalty": Case(2.0, EIGHT),
    "repetition_penalty": Case(0.01),
    "min_new_tokens": Case(4, STOPS | {"stop_token_ids": [TOKEN]}),
    "n": Case(3),
    "beam_width": Case(2),
    "json_schema": Case(JSON_SCHEMA, {"ignore_eos": False}),
    "regex": Case("[0-9]{8}", {"ignore_eos": False}),
    "ebnf": Case('root ::= "12" | "34"', {"ignore_eos": False}),
    "structural_tag": Case(
        '{"type": "structural_tag", "format": {"type": "regex", "pattern": "[0-9]{8}"}}',
        {"ignore_eos": False},
    ),
    "ignore_eos": Case(False, {"logit_bias": {"2": 100.0}}),
    "skip_special_tokens": Case(False, {"logit_bias": {"2": 100.0}}),
    "spaces_between_special_tokens": Case(False),
    "no_stop_trim": Case(True, {"stop": ["a", "e", "i", "o"], "ignore_eos": False}),
    "stream_interval": Case(4),
    "logit_bias": Case(BIAS),
    "sampling_seed": Case(5, {"temperature": 1.0, "sampling_seed": 6}),
    "custom_params": Case({"a": 1}),
    "watermark": Case({"enabled": True}),
    "stop_strs": Case(["a"], {"ignore_eos": False}),
    "stop_regex_strs": Case(["a"], {"ignore_eos": False}),
    "stop_str_max_len": Case(1),
    "stop_regex_max_len": Case(1),
    "is_normalized": Case(True),
    "ebnf_full_assistant": Case(True),
}
OF_BOTH = {
    "model": Case("another"),
    "bootstrap_host": Case("h"),
    "bootstrap_port": Case(1),
    "bootstrap_room": Case(1),
    "routed_dp_rank": Case(0),
    "disagg_prefill_dp_rank": Case(0),
    "data_parallel_rank": Case(0),
    "frequency_penalty": Case(2.0, EIGHT),
    "presence_penalty": Case(2.0, EIGHT),
    "repetition_penalty": Case(0.01),
    "logit_bias": Case(BIAS),
    "max_tokens": Case(3),
    "n": Case(3),
    "seed": Case(5, {"temperature": 1.0, "seed": 6}),
    "stop": Case(["a", "e", "i", "o"], {"ignore_eos": False}),
    "stream": Case(True),
    "stream_options": Case({"include_usage": True}, {"stream": True}),
    "temperature": Case(0.7, {"temperature": 1.5, "seed": 5}),
    "top_p": Case(0.001, {"temperature": 1.0, "seed": 5}),
    "top_k": Case(1, {"temperature": 1.0, "seed": 5}),
    "min_p": Case(0.99, {"temperature": 1.0, "seed": 5}),
    "user": Case("u"),
    "return_hidden_states": Case(True),
    "return_routed_experts": Case(True),
    "routed_experts_start_len": Case(1),
    "return_cached_tokens_details": Case(True),
    "return_spec_tokens_details": Case(True),
    "return_token_ids": Case(True),
    "min_tokens": Case(4, STOPS | {"stop_token_ids": [TOKEN]}),
    "regex": Case("[0-9]{8}", {"ignore_eos": False}),
    "ebnf": Case('root ::= "12" | "34"', {"ignore_eos": False}),
    "stop_token_ids": Case([TOKEN], STOPS),
    "stop_regex": Case("[a-z]{2}", {"ignore_eos": False}),
    "no_stop_trim": Case(True, {"stop": ["a", "e", "i", "o"], "ignore_eos": False}),
    "ignore_eos": Case(False, {"logit_bias": {"2": 100.0}}),
    "skip_special_tokens": Case(False, {"logit_bias": {"2": 100.0}}),
    "lora_path": Case("a"),
    "session_id": Case("s"),
    "session_params": Case({"id": "s"}),
    "response_format": Case(AS_SCHEMA, {"ignore_eos": False}),
    "custom_params": Case({"a": 1}),
    "custom_logit_processor": Case("{}"),
    "watermark": Case({"enabled": True}),
    "images_config": Case({}),
    "mm_processor_kwargs": Case({}),
    "rid": Case(GIVEN_ID),
    "extra_key": Case("k"),
    "cache_salt": Case("k"),
    "priority": Case(3),
    "custom_labels": Case({"a": "b"}),
}
COMPLETION = OF_BOTH | {
    "prompt": Case([9, 8, 7]),
    "best_of": Case(3),
    "echo": Case(True),
    "logprobs": Case(2),
    "suffix": Case("end"),
    "json_schema": Case(JSON_SCHEMA, {"ignore_eos": False}),
}
CHAT = OF_BOTH | {
    "messages": Case([{"role": "user", "content": "another"}]),
    "logprobs": Case(True),
    "top_logprobs": Case(2, {"logprobs": True}),
    "max_completion_tokens": Case(3),
    "tools": Case([TOOL]),
    "tool_choice": Case("required", {"tools": [TOOL]}),
    "parallel_tool_calls": Case(False, {"tools": [TOOL]}),
    "return_prompt_token_ids": Case(True),
    "return_meta_info": Case(True),
    "return_input_ids_in_sglext": Case(True),
    "return_output_ids_in_sglext": Case(True),
    "return_sampling_mask": Case(True),
    "sampling_logprobs_mode": Case("support"),
    "return_flat_raw_output_top_logprobs": Case(
        True, {"logprobs": True, "top_logprobs": 2, "return_meta_info": True}
    ),
    "return_flat_raw_top_logprobs_b64": Case(
        False,
        {
            "logprobs": True,
            "top_logprobs": 2,
            "return_meta_info": True,
            "return_flat_raw_output_top_logprobs": True,
        },
    ),
    "reasoning_effort": Case("low"),
    "thinking": Case({"type": "adaptive"}),
    "task": Case("action"),
    "continue_final_message": Case(
        True, {"messages": [*USER, {"role": "assistant", "content": "a"}]}
    ),
    "separate_reasoning": Case(False),
    "stream_reasoning": Case(False),
    "chat_template_kwargs": Case({"enable_thinking": False}),
    "max_dynamic_patch": Case(1),
    "min_dynamic_patch": Case(1),
    "use_audio_in_video": Case(True),
    "video_config": Case({}),
    "input_ids": Case([9, 8, 7]),
}
del CHAT["custom_labels"]
OPENAI = {"model": "m", "temperature": 0, "max_tokens": 8, "ignore_eos": True}

APIS = (
    Api("GenerateReqInput", "/generate", {"input_ids": IDS, "sampling_params": SAMPLING}, GENERATE),
    Api(
        "SamplingParams",
        "/generate",
        {"input_ids": IDS, "sampling_params": SAMPLING},
        PARAMS,
        "sampling_params",
    ),
    Api("CompletionRequest", "/v1/completions", OPENAI | {"prompt": TEXT}, COMPLETION),
    Api("ChatCompletionRequest", "/v1/chat/completions", OPENAI | {"messages": USER}, CHAT),
)


_REASONS = {
    "a model of text has no use for it": (
        *("image_data", "video_data", "audio_data", "mm_hashes", "mm_content_hashes"),
        *("use_audio_in_video", "video_config", "modalities", "need_wait_for_mm_inputs"),
        *("num_items_assigned", "encoder_urls", "max_dynamic_patch", "min_dynamic_patch"),
        *("image_max_dynamic_patch", "video_max_dynamic_patch", "images_config"),
        *("mm_processor_kwargs", "multi_item_delimiter_indices", "token_indices_to_pool"),
    ),
    "the router's to say: its own outweighs a client's": (
        *("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"),
        "decode_tp_size",
    ),
    "names a data-parallel rank, and there is one": (
        *("routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank"),
    ),
    "of logs, traces and metrics, not of the answer": (
        *("log_metrics", "no_logs", "external_trace_header", "received_time", "custom_labels"),
        *("routing_key", "conversation_id", "http_worker_ipc", "user"),
    ),
    "of caches, not of the answer": (
        *("extra_key", "cache_salt", "kv_hints", "session_id", "session_params"),
        "return_cached_tokens_details",
    ),
    "of the order of requests, not of the answer": ("priority", "background"),
    "of the chunks of a stream": ("stream_interval", "return_bytes"),
    "without its flag, or for another model, SGLang answers as if it were not given": (
        *("return_routed_experts", "routed_experts_start_len", "return_indexer_topk"),
        *("require_reasoning", "return_entropy", "custom_params", "return_spec_tokens_details"),
        *("reasoning_effort", "thinking", "task", "separate_reasoning", "stream_reasoning"),
        *("chat_template_kwargs", "tools", "parallel_tool_calls", "spaces_between_special_tokens"),
    ),
    "SGLang takes it for OpenAI's clients and has no use for it": ("best_of", "suffix"),
}
# Why a field's answer is the same without it, on one server too.
WITHOUT_EFFECT = {name: reason for reason, names in _REASONS.items() for name in names}


@cache
def declared() -> dict[str, frozenset[str]]:
    """The fields that SGLang has, by class."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    return {
        "GenerateReqInput": frozenset(each.name for each in dataclasses.fields(GenerateReqInput)),
        "SamplingParams": frozenset(SamplingParams.__struct_fields__),
        "CompletionRequest": frozenset(CompletionRequest.model_fields),
        "ChatCompletionRequest": frozenset(ChatCompletionRequest.model_fields),
    }
