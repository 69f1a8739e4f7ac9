"""What is asked of whom: the routes of each port, with schemas, and what a good request is."""

from typing import Any, Literal

import msgspec
from sglang.srt.sampling.sampling_params import SamplingParams

Target = Literal["prefill", "decode", "both", "bootstrap", "router"]
Schema = dict[str, Any]

# An operator's: by contract they stop, empty or change a server, or write files where it runs.
LEFT_OUT = {
    "weights change, or are sent elsewhere": (
        *("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_ipc"),
        *("/update_weights_from_distributed", "/update_weight_version", "/begin_weight_update"),
        *("/end_weight_update", "/init_weights_update_group", "/destroy_weights_update_group"),
        *("/init_weights_send_group_for_remote_instance", "/send_weights_to_remote_instance"),
        *("/weights_checker", "/load_lora_adapter", "/load_lora_adapter_from_tensors"),
        "/unload_lora_adapter",
    ),
    "nothing is generated afterwards, or slowly": (
        *("/pause_generation", "/continue_generation", "/slow_down", "/pd_role_switch"),
        *("/release_memory_occupation", "/resume_memory_occupation", "/scale_elastic_ep"),
    ),
    "caches and settings change": (
        *("/flush_cache", "/set_internal_state", "/configure_logging", "/set_trace_level"),
        *("/hicache/storage-backend", "/hicache/storage-backend/clear", "/freeze_gc"),
        *("/add_external_corpus", "/remove_external_corpus"),
    ),
    "profiles and records are written to files": (
        *("/start_profile", "/stop_profile", "/start_expert_distribution_record"),
        *("/stop_expert_distribution_record", "/dump_expert_distribution_record"),
        "/dumper/{method}",
    ),
}
SKIPPED = frozenset(path for paths in LEFT_OUT.values() for path in paths)

# What SGLang's router passes on, or answers itself. Its /workers, /wasm, /v1/tokenizers and
# /flush_cache are an operator's, too.
ROUTED = frozenset(
    (
        *("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/rerank"),
        *("/v1/embeddings", "/v1/classify", "/v1/tokenize", "/v1/detokenize", "/v1/models"),
        *("/v1/models/{model}", "/v1/responses/{response_id}", "/get_model_info", "/health"),
        *("/get_server_info", "/health_generate"),
    )
)
# These reach a scheduler, so most requests are for them.
GENERATING = ("/generate", "/v1/completions", "/v1/chat/completions")
# Schemathesis takes minutes for a few negative examples of unions of unions, as messages and
# structural tags are. Fields at an edge and bent bodies are wrong enough.
POSITIVE_ONLY = frozenset(
    ("/v1/completions", "/v1/chat/completions", "/invocations", "/v1/messages")
)

_SAID = [{"role": "user", "content": "Hello"}]
GOOD: dict[str, dict[str, Any]] = {
    "/generate": {
        "input_ids": [5, 6, 7, 8],
        "sampling_params": {"temperature": 0, "max_new_tokens": 4},
    },
    "/v1/completions": {"model": "default", "prompt": "Hello", "max_tokens": 4},
    "/v1/chat/completions": {"model": "default", "messages": _SAID, "max_tokens": 4},
    "/invocations": {"model": "default", "messages": _SAID, "max_tokens": 4},
    "/v1/messages": {"model": "default", "messages": _SAID, "max_tokens": 4},
    "/v1/messages/count_tokens": {"model": "default", "messages": _SAID},
    "/v1/responses": {"model": "default", "input": "Hello", "max_output_tokens": 4},
    "/api/chat": {"model": "default", "messages": _SAID, "options": {"num_predict": 4}},
    "/api/generate": {"model": "default", "prompt": "Hello", "options": {"num_predict": 4}},
    "/vertex_generate": {"instances": [{"text": "Hello"}], "parameters": {"max_new_tokens": 4}},
    "/v1/tokenize": {"model": "default", "prompt": "Hello"},
    "/v1/detokenize": {"model": "default", "tokens": [5, 6, 7]},
    "/v1/embeddings": {"model": "default", "input": "Hello"},
    "/v1/classify": {"model": "default", "input": "Hello"},
    "/v1/score": {"model": "default", "query": "a", "items": ["b"], "label_token_ids": [5, 6]},
    "/v1/rerank": {"query": "a", "documents": ["b", "c"]},
    "/encode": {"text": "Hello"},
    "/classify": {"text": "Hello"},
    "/separate_reasoning": {"text": "Hello", "reasoning_parser": "qwen3"},
    "/parse_function_call": {"text": "Hello", "tools": [], "tool_call_parser": "qwen25"},
    "/open_session": {"capacity_of_str_len": 100},
    "/close_session": {"session_id": "x"},
    "/abort_request": {"rid": "x"},
}


def _takes(fields: dict[str, str]) -> Schema:
    properties = {name: {"type": kind} for name, kind in fields.items()}
    body = {"type": "object", "properties": properties, "required": list(fields)}
    return {
        "requestBody": {"content": {"application/json": {"schema": body}}, "required": True},
        "responses": {"200": {"description": "done"}},
    }


BOOTSTRAP: Schema = {
    "openapi": "3.1.0",
    "info": {"title": "SGLang's bootstrap server, as HmaBootstrapServer has it", "version": "1"},
    "paths": {
        "/route": {
            "get": {
                "parameters": [
                    {"name": name, "in": "query", "required": True, "schema": {"type": "integer"}}
                    for name in (
                        *("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank"),
                        "target_pp_rank",
                    )
                ],
                "responses": {"200": {"description": "who has the pages"}},
            },
            "put": _takes(
                {
                    **dict.fromkeys(
                        (
                            *("attn_tp_size", "attn_tp_rank", "attn_cp_size", "attn_cp_rank"),
                            *("attn_dp_size", "attn_dp_rank", "pp_size", "pp_rank", "page_size"),
                            *("system_dp_size", "system_dp_rank", "rank_port"),
                        ),
                        "integer",
                    ),
                    **dict.fromkeys(("rank_ip", "kv_cache_dtype", "hma_own_seal"), "string"),
                }
            ),
        },
        "/register_dp_rank": {
            "post": _takes({"bootstrap_room": "integer", "dp_rank": "integer"}),
        },
        "/query_dp_ranks": {"post": _takes({"bootstrap_rooms": "array"})},
        "/health": {"get": {"responses": {"200": {"description": "it lives"}}}},
    },
}


def of_server(document: Schema) -> Schema:
    """A server's OpenAPI document without what is left out, and with SGLang's sampling parameters,
    which it has as any object; all of their fields, since a client may give each."""
    fields = msgspec.structs.fields(SamplingParams)
    found, own = msgspec.json.schema_components(
        [field.type for field in fields], ref_template="#/components/schemas/{name}"
    )
    names = [field.encode_name for field in fields]
    sampling = {"type": "object", "properties": dict(zip(names, found, strict=True))}
    parts = document["components"]["schemas"]
    generate = parts["GenerateReqInput"]
    properties = generate["properties"] | {"sampling_params": sampling}
    parts = parts | own | {"GenerateReqInput": generate | {"properties": properties}}
    paths = {path: one for path, one in document["paths"].items() if path not in SKIPPED}
    return document | {"paths": paths, "components": document["components"] | {"schemas": parts}}
