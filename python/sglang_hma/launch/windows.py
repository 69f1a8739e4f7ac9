"""Models that mix layers with and without a sliding window: in one pool, or in two."""

from typing import Any

from sglang_hma.config import HmaConfig

# Those of SGLang's models with two KV pools whose layers, but for windows and sinks, are alike.
ALIKE = ("GptOssForCausalLM",)


def has_two_pools(config: HmaConfig, server_args: Any, name: str) -> bool:
    """Whether layers with a window get a pool of their own, whose pages are freed behind it.

    Otherwise one pool holds all layers, and those with a window keep what lies behind it: on
    prefill and decode servers, where pages of all layers travel under the same numbers; with
    drafts, whose slots are not given in two pools; where a prompt is computed in one piece, which
    may not fit the window layers' pool; and where two were not tried: on a GPU, with several ranks,
    with sessions.
    """
    chunk = server_args.chunked_prefill_size
    sessions = server_args.enable_streaming_session or server_args.enable_session_radix_cache
    return (
        config.may_have_two_pools
        and name in ALIKE
        and not server_args.disable_hybrid_swa_memory
        and server_args.speculative_algorithm is None
        and server_args.tp_size == 1
        and not sessions
        and (chunk is None or chunk > 0)
    )
