"""What launch_server refuses, in one line each: flags and models that do not go together."""

import argparse
import sys
from importlib.util import find_spec
from typing import Any, NoReturn

from sglang_hma.config import MESHES, PAGE_TOKENS, HmaConfig, PrefillRuntime

# flag: (the only value that works with BFP8 pages or None for "not at all", why)
BFP8_CONFLICTS: dict[str, tuple[str | None, str]] = {
    "--page-size": (str(PAGE_TOKENS), "a BFP8 page is one tile of 32 tokens"),
    "--attention-backend": ("hma", "only the hma backend reads BFP8 pages"),
    "--prefill-attention-backend": ("hma", "only the hma backend reads BFP8 pages"),
    "--decode-attention-backend": ("hma", "only the hma backend reads BFP8 pages"),
    "--kv-cache-dtype": ("auto", "--hma-kv-format decides how K and V are stored"),
    "--enable-mixed-chunk": (None, "prefill and decode use different weights and page formats"),
    "--speculative-algorithm": (None, "draft models need a second KV pool"),
    "--enable-hierarchical-cache": (None, "host pools copy SGLang's own page layout"),
    "--disaggregation-decode-enable-radix-cache": (
        None,
        "a cached prefix on decode would mix page formats inside one transfer",
    ),
    "--pp-size": ("1", "page descriptors cover all layers"),
    "--pipeline-parallel-size": ("1", "page descriptors cover all layers"),
    "--enable-dp-attention": (None, "not tried with BFP8 pages"),
    "--enable-unified-memory": (None, "it replaces the KV pool"),
    "--enable-hisparse": (None, "it replaces the KV pool"),
    "--enable-page-major-kv-layout": (None, "it replaces the KV pool"),
    "--enable-pd-role-switch": (None, "prefill and decode keep different weights and pages"),
    "--dcp-size": ("1", "pages would be split between ranks"),
    "--enable-lora": (None, "adapters would be added to rounded weights"),
}


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    sys.stderr.write(f"sglang_hma.launch_server: error: {message}\n")
    raise SystemExit(2)


def flag_value(argv: list[str], flag: str) -> str | None:
    """The last value given for `flag`, '' for a bare flag, None if it is absent."""
    found = None
    for i, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name == flag:
            following = argv[i + 1] if i + 1 < len(argv) else ""
            found = value if equals else ("" if following.startswith("--") else following)
    return found


def prefill_runtime(ours: argparse.Namespace, role: str, device: str | None) -> PrefillRuntime:
    """What computes."""
    chosen = ours.hma_prefill_runtime
    fits = role == "prefill" and ours.hma_kv_format == "bfp8" and device in (None, "cpu")
    if chosen == "ttnn" and not fits:
        fail(
            "--hma-prefill-runtime is ttnn: a card serves --disaggregation-mode prefill with "
            "--hma-kv-format bfp8, and no --device but cpu goes with it"
        )
    if chosen == "auto":
        from sglang_hma.prefill.ttnn.card import visible_cards

        there = fits and device is None and visible_cards() and find_spec("ttnn") is not None
        chosen = "ttnn" if there else "reference"
    if chosen == "reference":
        for flag, value in (
            ("--hma-device-ids", ours.hma_device_ids),
            ("--hma-mesh", ours.hma_mesh),
        ):
            if value is not None:
                fail(f"{flag} is given, but no card computes: add --hma-prefill-runtime ttnn")
    return chosen


def cards(ours: argparse.Namespace, runtime: PrefillRuntime) -> tuple[tuple[int, ...], int]:
    """Numbers of the cards and how many of their chips form a mesh."""
    ids = ours.hma_device_ids or (0,)
    chips = ours.hma_mesh or len(ids)
    if chips < len(ids) or chips not in MESHES.values():
        shown = ",".join(map(str, ids))
        fail(
            f"--hma-device-ids is {shown}: 1, 2 or 4 cards form a mesh, of one chip each or of the "
            "number in --hma-mesh"
        )
    if runtime == "ttnn":
        from sglang_hma.prefill.ttnn.card import CardError, require_cards

        try:
            require_cards(ids)
        except CardError as error:
            fail(str(error))
    return ids, chips


def check_conflicts(config: HmaConfig, argv: list[str]) -> None:
    if config.on_card:
        for flag in ("--tp-size", "--tensor-parallel-size", "--tp"):
            if flag_value(argv, flag) not in (None, "1"):
                fail(
                    f"{flag} is {flag_value(argv, flag)}: on Tenstorrent cards --hma-mesh splits "
                    "the model, in one process"
                )
    if not config.packs_kv:
        if config.weight_formats.packs_any:
            fail(
                "--hma-weight-format is bfp8 but --hma-kv-format is native, which switches all "
                "formats off: leave one of them out"
            )
        if config.sends_early and flag_value(argv, "--page-size") == "1":
            fail(
                "--page-size is 1: layers leave early only in pages of several tokens; use "
                f"--page-size {PAGE_TOKENS} on both servers, or --hma-layers-per-send all"
            )
        return
    for flag, (allowed, why) in BFP8_CONFLICTS.items():
        value = flag_value(argv, flag)
        if value is None or value == allowed:
            continue
        shown = f"{flag} {value}".strip()
        remedy = f"use {flag} {allowed}" if allowed else "leave it out"
        fail(f"{shown} does not go with --hma-kv-format bfp8 ({why}): {remedy}")
    backend = flag_value(argv, "--disaggregation-transfer-backend")
    if backend is not None and not backend.startswith("mooncake"):
        fail(
            f"--disaggregation-transfer-backend is {backend}: BFP8 pages travel with mooncake "
            "or mooncake_tcp"
        )
    backup = flag_value(argv, "--disaggregation-decode-retraction-backup")
    if backup not in (None, "cpu_tensor", "none"):
        fail(
            f"--disaggregation-decode-retraction-backup is {backup}, which copies SGLang's own "
            "page layout: use cpu_tensor"
        )
    dtype = flag_value(argv, "--dtype")
    if dtype in ("half", "float16"):
        fail(f"--dtype is {dtype}: K and V are kept in BFP8 and BF16, use bfloat16 or float32")
    chunk = flag_value(argv, "--chunked-prefill-size")
    if chunk and chunk.isdecimal() and int(chunk) % PAGE_TOKENS:
        fail(f"--chunked-prefill-size is {chunk}: use a multiple of {PAGE_TOKENS}, the page size")


def check_model(config: HmaConfig, server_args: Any) -> Any:
    """SGLang's ModelConfig, after a one-line refusal of models without plain KV pages."""
    from sglang.srt.configs.model_config import AttentionArch, ModelConfig

    try:
        model = ModelConfig.from_server_args(server_args)
    except Exception as error:  # whatever transformers makes of a broken config
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        fail(f"--model-path is {server_args.model_path}: {reason}")
    if not config.packs_kv:
        return model
    name = (model.hf_config.architectures or ["model"])[0]
    remedy = "serve it with --hma-kv-format native"
    if model.attention_arch != AttentionArch.MHA:
        fail(
            f"{name} uses {model.attention_arch.name} attention, BFP8 pages need MHA/GQA: {remedy}"
        )
    from sglang.srt.configs.hybrid_arch import mambaish_config

    if mambaish_config(model) is not None:
        fail(f"{name} has state-space layers, BFP8 pages need MHA/GQA in every layer: {remedy}")
    if getattr(model, "is_hybrid_swa", False):
        fail(f"{name} mixes sliding-window and full attention in two KV pools: {remedy}")
    if config.on_card:
        from sglang_hma.prefill.ttnn.shape import ModelShape, UnsupportedModel

        try:
            ModelShape.of(model.hf_config).split(config.chips)
        except UnsupportedModel as error:
            fail(f"{error}: serve it with --hma-prefill-runtime reference")
    for label, dim in (("head_dim", model.head_dim), ("v_head_dim", model.v_head_dim)):
        if dim % PAGE_TOKENS:
            fail(f"{name} has {label} {dim}, BFP8 tiles need a multiple of {PAGE_TOKENS}: {remedy}")
    if str(model.dtype) == "torch.float16":
        fail(f"{name} is float16: add --dtype bfloat16, K and V are kept in BFP8 and BF16")
    return model
