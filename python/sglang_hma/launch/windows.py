"""Models that mix layers with and without a sliding window: in one pool, or in two."""

from typing import Any

from sglang_hma.config import HmaConfig
from sglang_hma.launch.flags import Refusal

# Those of SGLang's models with two KV pools whose layers, but for windows and sinks, are alike.
ALIKE = ("GptOssForCausalLM",)


def has_two_pools(config: HmaConfig, server_args: Any, name: str) -> bool:
    """Whether layers with a window get a pool of their own, whose pages are freed behind it.

    Otherwise one pool holds all layers, and those with a window keep what lies behind it: with
    drafts, whose slots are not given in two pools; where a prompt is computed in one piece, which
    may not fit the window layers' pool; and where two were not tried: on a GPU, with several ranks,
    with sessions.

    A prefill and a decode server must have as many. Raises Refusal for what only one of them is
    given and two pools do not go with.
    """
    if (
        not config.may_have_two_pools
        or name not in ALIKE
        or server_args.disable_hybrid_swa_memory
        or server_args.tp_size != 1
        or server_args.enable_streaming_session
        or server_args.enable_session_radix_cache
    ):
        return False
    flag = _in_the_way(config, server_args)
    if flag is not None and config.role != "null":
        raise Refusal(
            f"{flag} does not go with a pool of their own for layers with a window, which {name} "
            "has here: leave it out, or add --disable-hybrid-swa-memory on prefill and on decode"
        )
    return flag is None


def _in_the_way(config: HmaConfig, server_args: Any) -> str | None:
    """A flag that two pools do not go with, where this role has a use for it."""
    if server_args.speculative_algorithm is not None:
        return f"--speculative-algorithm {server_args.speculative_algorithm}"
    if config.role == "decode":
        caches = server_args.disaggregation_decode_enable_radix_cache
        return "--disaggregation-decode-enable-radix-cache" if caches else None
    chunk = server_args.chunked_prefill_size
    if chunk is not None and chunk <= 0:
        return f"--chunked-prefill-size {chunk}"
    if server_args.enable_hierarchical_cache:
        return "--enable-hierarchical-cache"
    if config.offload_below:
        return f"--hma-offload-threshold {config.offload_below}"
    return None
