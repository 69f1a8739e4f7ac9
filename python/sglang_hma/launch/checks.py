"""What a server refuses of SGLang's arguments, in one line each.

The rules look at the typed ServerArgs, so it does not matter how a flag was written. They look
twice: at what the user asked for, and at what SGLang made of it for the model. Before that,
`check_early` refuses what is plain to see without SGLang, whose import takes seconds.
"""

import argparse
import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_hma import cluster_secret
from sglang_hma.config import DRAFT_ALGORITHMS, MOST_DRAFT_TOKENS, PAGE_TOKENS, HmaConfig, Role
from sglang_hma.launch.flags import Parser, Refusal, parser_of, read


@dataclass(frozen=True)
class Rule:
    """`allowed`: the values of a ServerArgs field that work, or a test for them. Where False is
    one of them, the flag takes no value."""

    field: str
    allowed: tuple[Any, ...] | Callable[[Any], bool]
    why: str
    remedy: str

    @property
    def flag(self) -> str:
        """As a user can write it."""
        return f"--{self.field.replace('_', '-')}"

    def allows(self, value: Any) -> bool:
        return self.allowed(value) if callable(self.allowed) else value in self.allowed


def _off(field: str, why: str, *allowed: Any) -> Rule:
    """A switch, or with `allowed` another flag, that must keep SGLang's default."""
    return Rule(field, allowed or (False,), why, "leave it out")


def _only(field: str, why: str, *allowed: Any) -> Rule:
    """The first of `allowed` that is set is the one to use."""
    use = next(value for value in allowed if value is not None)
    return Rule(field, allowed, why, f"use --{field.replace('_', '-')} {use}")


HMA_READS = "only the hma backend reads BFP8 pages"
OWN_LAYOUT = "it copies SGLang's own page layout"
OTHER_POOL = "it replaces the KV pool"
BOTH_PHASES = "prefill and decode use different weights and page formats"
ADAPTERS = "adapters were not tried with it"
SPLIT_PAGES = "pages would be split between ranks"

WITH_BFP8 = (
    _only("page_size", f"a BFP8 page is one tile of {PAGE_TOKENS} tokens", PAGE_TOKENS),
    _only("attention_backend", HMA_READS, "hma"),
    _only("prefill_attention_backend", HMA_READS, None, "hma"),
    _only("decode_attention_backend", HMA_READS, None, "hma"),
    _only("kv_cache_dtype", "--hma-kv-format decides how K and V are stored", "auto"),
    Rule(
        "dtype",
        lambda value: value not in ("half", "float16"),
        "K and V are kept in BFP8 and BF16",
        "use bfloat16 or float32",
    ),
    Rule(
        "chunked_prefill_size",
        lambda value: value is None or value <= 0 or value % PAGE_TOKENS == 0,
        "a chunk ends on a page's edge",
        f"use a multiple of {PAGE_TOKENS}, the page size",
    ),
    _off("enable_mixed_chunk", BOTH_PHASES),
    _off("enable_pdmux", BOTH_PHASES),
    _off("enable_pd_role_switch", BOTH_PHASES),
    Rule(
        "speculative_algorithm",
        (None, *DRAFT_ALGORITHMS),
        "only NGRAM and STANDALONE draft from tokens alone; the others read hidden states of the "
        "prompt, which prefill does not send",
        "use NGRAM, use STANDALONE with --speculative-draft-model-path, or leave it out",
    ),
    _only("speculative_eagle_topk", "drafts are verified as chains", None, 1),
    _off("speculative_adaptive", "not tried with BFP8 pages"),
    _only("speculative_draft_attention_backend", HMA_READS, None, "hma"),
    _off("speculative_draft_kv_cache_dtype", "drafts' KV lies in the target's page formats", None),
    Rule(
        "speculative_num_draft_tokens",
        lambda value: value is None or value <= MOST_DRAFT_TOKENS,
        f"decode attention takes at most {MOST_DRAFT_TOKENS} tokens of a request",
        f"use {MOST_DRAFT_TOKENS} or fewer",
    ),
    _only("hicache_io_backend", "copies of BFP8 pages are plain bytes", "direct"),
    _only("hicache_mem_layout", "copies of BFP8 pages are plain bytes", "layer_first"),
    Rule(
        "hicache_storage_backend",
        (None,),
        "BFP8 pages go to no storage behind the host's memory",
        "leave it out",
    ),
    Rule(
        "hicache_host_memory_mode",
        ("cache",),
        "BFP8 pages go to no storage behind the host's memory",
        "leave it out",
    ),
    _off("enable_lmcache", OWN_LAYOUT),
    _off("enable_flexkv", OWN_LAYOUT),
    _off("enable_unified_cache_external_linker", OWN_LAYOUT),
    _off("radix_cache_backend", "not tried with BFP8 pages", None),
    _off("kv_canary", OWN_LAYOUT, "none"),
    _off("enable_unified_memory", OTHER_POOL),
    _off("enable_hisparse", OTHER_POOL),
    _off("enable_page_major_kv_layout", OTHER_POOL),
    _off("prefill_only_disable_kv_cache", OTHER_POOL),
    _off("enable_kv_cache_sharding", SPLIT_PAGES),
    _only("dcp_size", SPLIT_PAGES, 1),
    _only("attn_cp_size", SPLIT_PAGES, 1),
    _off("enable_prefill_cp", SPLIT_PAGES),
    _only("pp_size", "page descriptors cover all layers", 1),
    _only("attn_dp_size", "not tried with BFP8 pages", 1),
    _off("enable_dp_attention", "not tried with BFP8 pages"),
    _off("enable_two_batch_overlap", "not tried with BFP8 pages"),
    _only(
        "disaggregation_transfer_backend",
        "BFP8 pages travel with mooncake or mooncake_tcp",
        "mooncake",
        "mooncake_tcp",
    ),
    _only("disaggregation_decode_retraction_backup", OWN_LAYOUT, None, "cpu_tensor", "none"),
    _off("disaggregation_decode_enable_offload_kvcache", OWN_LAYOUT),
    Rule(
        "disaggregation_decode_host_receive_threshold",
        lambda value: value >= 1,
        OWN_LAYOUT,
        "leave it out",
    ),
    _off("disaggregation_decode_allocation_policy", "not tried with BFP8 pages", "early"),
    _off(
        "disaggregation_enable_kv_checksum",
        "the last page is unpacked when it has arrived; --hma-kv-checksum compares all of them",
    ),
)

NO_ADAPTERS = (
    _off("enable_lora", ADAPTERS, False, None),
    Rule("lora_paths", lambda value: not value, ADAPTERS, "leave it out"),
)

ON_CARDS = (
    Rule(
        "tp_size",
        (1,),
        "on Tenstorrent cards one process serves, and --hma-mesh splits the model",
        "leave it out",
    ),
    *NO_ADAPTERS,
    _off("enable_hierarchical_cache", "pages come from the card's own memory"),
)

DECODE_ANSWERS = "decode answers, and has only its own: prefill sends none"
ONE_SERVERS = "a session is of one server's cache"
IN_A_PAIR = (
    _off("enable_return_routed_experts", DECODE_ANSWERS),
    _off("enable_return_indexer_topk", DECODE_ANSWERS),
    _off("enable_streaming_session", ONE_SERVERS),
    _off("enable_session_radix_cache", ONE_SERVERS),
)

NO_DRAFTS = "speculative_algorithm"
ON_PREFILL = (_off(NO_DRAFTS, "drafts are verified where tokens are generated", None),)
NO_HOST_CACHE = "enable_hierarchical_cache"
WHERE_TOKENS_ARE_MADE = (_off(NO_HOST_CACHE, "pages of two formats are not copied to the host"),)
ON_A_GPU = (_off(NO_DRAFTS, "verifying drafts over BFP8 pages was not tried on a GPU", None),)

EARLY_WITHOUT_BFP8 = (
    Rule(
        "page_size",
        lambda value: value != 1,
        "layers leave early only in pages of several tokens",
        f"use --page-size {PAGE_TOKENS} on both servers, or --hma-layers-per-send all",
    ),
)

# SGLang's switches that are no flags: (name, why).
ENVIRONMENT = (
    (
        "SGLANG_DISAGG_STAGING_BUFFER",
        "sglang-hma cuts pages by heads itself where tensor parallelism differs",
    ),
    (
        "SGLANG_MOONCAKE_SEND_AUX_TCP",
        "metadata travels with the pages; decode takes none from its control port",
    ),
)


def rules(config: HmaConfig) -> list[tuple[str, Sequence[Rule]]]:
    """What applies, each with what asks for it."""
    found: list[tuple[str, Sequence[Rule]]] = []
    if config.role != "null":
        found.append((f"--disaggregation-mode {config.role}", IN_A_PAIR))
    if config.on_card:
        found.append(("--hma-prefill-runtime ttnn", ON_CARDS))
    if config.packs_kv:
        found.append(("--hma-kv-format bfp8", WITH_BFP8))
        if config.role == "prefill":
            found.append(("--disaggregation-mode prefill", ON_PREFILL))
        else:
            asks = f"--disaggregation-mode {config.role}"
            found.append((asks, WHERE_TOKENS_ARE_MADE))
        if config.offload_below:
            found.append((f"--hma-offload-threshold {config.offload_below}", NO_ADAPTERS))
        if config.device != "cpu":
            found.append((f"--device {config.device}", ON_A_GPU))
    elif config.sends_early:
        found.append((f"--hma-layers-per-send {config.layers_per_send}", EARLY_WITHOUT_BFP8))
    return found


def check_secret(path: str) -> None:
    """Refuse a --hma-cluster-secret-file that is none."""
    try:
        cluster_secret.read(path)
    except ValueError as error:
        raise Refusal(f"--hma-cluster-secret-file is {path}: {error}") from None


def check_early(role: Role, hma: argparse.Namespace, argv: Sequence[str]) -> None:
    """Refuse without SGLang what `check_arguments` would refuse, where the words show it.

    `hma` has the --hma-* flags of `argv`.
    """
    found = rules(
        HmaConfig(role=role, kv_format=hma.hma_kv_format, layers_per_send=hma.hma_layers_per_send)
    )
    given = vars(read(early_parser(found), argv))
    for asks, table in found:
        for rule in table:
            if not isinstance(rule.allowed, tuple):
                continue
            value = given[rule.field]
            if value not in (None, "false", *map(str, rule.allowed)):
                raise _does_not_go(rule, True if rule.allows(False) else value, asks)


def early_parser(found: Sequence[tuple[str, Sequence[Rule]]]) -> Parser:
    """Of the flags whose value can be compared as a word."""
    plain = [rule for _, table in found for rule in table if isinstance(rule.allowed, tuple)]
    switches = dict.fromkeys(rule.flag for rule in plain if rule.allows(False))
    others = dict.fromkeys(rule.flag for rule in plain if not rule.allows(False))
    return parser_of(*others, switches=list(switches))


def _does_not_go(rule: Rule, value: Any, asks: str) -> Refusal:
    shown = rule.flag if value is True else f"{rule.flag} {_shown(value)}"
    return Refusal(f"{shown} does not go with {asks} ({rule.why}): {rule.remedy}")


def check_arguments(config: HmaConfig, server_args: Any) -> None:
    """Refuse what the user asked for, if it cannot work. `server_args` are not resolved yet."""
    if config.packs_kv and server_args.speculative_algorithm == "STANDALONE":
        _check_draft_model(server_args)
    for asks, table in rules(config):
        for rule in table:
            value = getattr(server_args, rule.field)
            if not rule.allows(value):
                raise _does_not_go(rule, value, asks)
    keeps = config.packs_kv and server_args.disaggregation_decode_enable_radix_cache
    if config.role == "decode" and config.decode_cache == "prompt" and not keeps:
        raise Refusal(
            "--hma-decode-cache is prompt, but this server keeps no prefixes in BFP8: add "
            "--disaggregation-decode-enable-radix-cache, with --hma-kv-format bfp8"
        )
    drafts = config.packs_kv and server_args.speculative_algorithm is not None
    if drafts and (server_args.enable_lora or server_args.lora_paths):
        raise Refusal(
            f"--speculative-algorithm is {server_args.speculative_algorithm}, which was not tried "
            "with adapters: leave it or the --lora flags out"
        )
    compiler = os.environ.get("CXX", "c++")
    if drafts and server_args.speculative_algorithm == "NGRAM" and shutil.which(compiler) is None:
        raise Refusal(
            f"--speculative-algorithm is {server_args.speculative_algorithm}, whose corpus SGLang "
            f"compiles at its first start, and there is no {compiler}: install a C++ compiler, or "
            "name it in CXX"
        )
    if drafts and server_args.enable_watermark:
        raise Refusal(
            "--enable-watermark does not go with --speculative-algorithm here (no watermark would "
            "be drawn): leave one of them out"
        )
    from sglang.srt.environ import envs

    for name, why in ENVIRONMENT:
        if config.role != "null" and getattr(envs, name).get():
            raise Refusal(f"{name} is {os.environ[name]} in the environment ({why}): unset it")


def _check_draft_model(server_args: Any) -> None:
    if server_args.speculative_draft_model_path is None:
        raise Refusal(
            "--speculative-algorithm is STANDALONE, and no model is there to draft: add "
            "--speculative-draft-model-path, a small model of the same vocabulary"
        )
    if server_args.speculative_num_steps >= MOST_DRAFT_TOKENS:
        raise Refusal(
            f"--speculative-num-steps is {server_args.speculative_num_steps}, and decode attention "
            f"takes at most {MOST_DRAFT_TOKENS} tokens of a request: use {MOST_DRAFT_TOKENS - 1} "
            "or fewer"
        )


def check_resolved(config: HmaConfig, server_args: Any) -> None:
    """Refuse what SGLang has decided for this model beyond what it was asked for."""
    from sglang.srt.arg_groups.overrides import resolution_result

    for asks, table in rules(config):
        for rule in table:
            value = resolution_result(server_args, rule.field)
            if not rule.allows(value):
                raise Refusal(
                    f"SGLang sets {rule.flag} to {_shown(value)} for this model, which does not "
                    f"go with {asks} ({rule.why}): serve it with --hma-kv-format native"
                )


def resolve(config: HmaConfig, server_args: Any) -> None:
    """SGLang's own validation and decisions, then ours once more. Raises Refusal."""
    grpc = server_args.smg_grpc_mode or server_args.grpc_mode
    if grpc and server_args.tokenizer_path is None:
        # sglang.launch_server would do it, but resolved arguments cannot be changed.
        server_args.tokenizer_path = server_args.model_path
    try:
        server_args.resolve_once()
        # SGLang's engine checks them again, and cannot where the first check has read --lora-paths.
        copy.deepcopy(server_args).check_server_args()
    except (AssertionError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise Refusal(f"SGLang refuses its arguments: {one_line(error)}") from error
    check_resolved(config, server_args)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
