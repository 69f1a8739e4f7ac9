"""What sglang-hma gives SGLang and its router where the user said nothing."""

import os
from typing import Any

import psutil

from sglang_hma.config import DRAFT_ALGORITHMS, MOST_DRAFT_TOKENS, PAGE_TOKENS, SHARE_ENV, HmaConfig

CPU_KV_SHARE_OF_MEMORY = 0.2
MODEST_TOKENS = 64 * 1024
# A server that paused or restarted gets requests again after seconds. With the router's own
# defaults ten failed requests close it for a minute, and three missed checks for two.
SOON_BACK = (
    *("--health-success-threshold", "1"),
    *("--cb-timeout-duration-secs", "5", "--cb-success-threshold", "1"),
)
# A dead server refuses at once, and until the router has missed it each try of a request meets it
# again by chance: one of two, five times within 0.4 s, as is the router's own default, for one
# request in 32; ten times within 3.5 s for one in 1,000. No lower --cb-failure-threshold instead:
# a failed request counts against both of its servers, also the one that is well.
TRIES = ("--retry-max-retries", "10", "--retry-max-backoff-ms", "1000")
ROUTER_DEFAULTS = ("--health-check-interval-secs", "10", *SOON_BACK)
# Of sglang_hma.launch_server (launch/http_app.py). SGLang's /health makes a token, and waits for
# the pass that is running: three in a row come too late, and the router drops a busy server.
LIVE_PATH = "/health/live"
# Two missed checks, not three: it answers at once, and one good check brings a server back.
LIVE_ROUTER_DEFAULTS = (
    *("--health-check-endpoint", LIVE_PATH, "--health-check-interval-secs", "3"),
    *("--health-failure-threshold", "2"),
    *SOON_BACK,
    *TRIES,
)
DRAFT_STEPS = 3  # of a draft model, as SGLang has them
NO_CUDA_GRAPHS = ("--disable-prefill-cuda-graph", "--disable-decode-cuda-graph")


def defaults(config: HmaConfig) -> list[str]:
    """Flags to stand before the user's own."""
    flags = ["--device", config.device]
    if config.bind:
        flags += ["--host", config.bind]
    flags += ["--uvicorn-access-log-exclude-prefixes", LIVE_PATH]  # asked every few seconds
    on_cpu = config.device == "cpu"
    if config.packs_kv:
        flags += ["--attention-backend", "hma", "--page-size", str(PAGE_TOKENS)]
        flags += ["--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"]
    else:
        if config.role != "null":
            flags += ["--page-size", str(PAGE_TOKENS)]
        if on_cpu or config.torch_ops:
            flags += ["--attention-backend", "torch_native"]
    if on_cpu or config.torch_ops or (config.packs_kv and config.role != "decode"):
        flags += NO_CUDA_GRAPHS
    # On a CPU, or with a card that the host waits for, there is nothing to overlap with: a result
    # would be looked at one pass or step late.
    if on_cpu:
        flags += ["--disable-overlap-schedule"]
    if on_cpu:
        flags += ["--sleep-on-idle"]
    if on_cpu or config.torch_ops:
        flags += ["--sampling-backend", "pytorch"]
    if config.role != "null":
        flags += ["--disaggregation-transfer-backend", "mooncake_tcp" if on_cpu else "mooncake"]
    if config.role == "decode":
        flags += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    return flags


def draft_defaults(config: HmaConfig, given: Any) -> list[str]:
    """Chains that decode attention takes. NGRAM's 12 tokens are more, and its trees of breadth 10
    go with pages of one token. A draft model's chain is one token longer than its steps."""
    if given.speculative_algorithm not in DRAFT_ALGORITHMS or not config.packs_kv:
        return []
    if given.speculative_algorithm == "NGRAM":
        return [
            *("--speculative-num-draft-tokens", str(MOST_DRAFT_TOKENS)),
            *("--speculative-ngram-max-bfs-breadth", "1"),
        ]
    tokens = given.speculative_num_draft_tokens
    if given.speculative_num_steps is not None or tokens is None:
        tokens = (given.speculative_num_steps or DRAFT_STEPS) + 1
    return [
        *("--speculative-num-steps", str(tokens - 1)),
        *("--speculative-num-draft-tokens", str(tokens)),
        *("--speculative-eagle-topk", "1"),
    ]


def adapter_defaults(config: HmaConfig) -> list[str]:
    """Where --enable-lora or --lora-paths is given: SGLang's own choice needs Triton on a GPU."""
    return ["--lora-backend", "torch_native"] if config.device == "cpu" or config.torch_ops else []


def size_pool(config: HmaConfig, server_args: Any, model: Any, *drafters: Any) -> None:
    """A KV cache for a CPU box: MODEST_TOKENS or one whole context, as far as they go into this
    server's part of CPU_KV_SHARE_OF_MEMORY, those of models that draft included."""
    if (server_args.max_total_tokens, server_args.mem_fraction_static) != (None, None):
        return
    servers = max(1, int(os.environ.get(SHARE_ENV, "1")))
    budget = psutil.virtual_memory().total * CPU_KV_SHARE_OF_MEMORY / servers
    tp_size = server_args.tp_size
    elements = sum(
        each.num_hidden_layers
        * (each.get_num_kv_heads(tp_size) * tp_size)
        * (each.head_dim + each.v_head_dim)
        for each in (model, *drafters)
    )
    bytes_per_element = 17 / 16 if config.packs_kv else model.dtype.itemsize
    tokens = int(budget / (elements * bytes_per_element)) // 1024 * 1024
    wanted = max(MODEST_TOKENS, -(-model.context_len // 1024) * 1024)
    server_args.max_total_tokens = min(max(tokens, 2048), wanted)
    server_args.mem_fraction_static = 0.95
