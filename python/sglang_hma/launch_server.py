"""python -m sglang_hma.launch_server: one SGLang server, prefill, decode or both.

Takes every flag of sglang.launch_server and the --hma-* flags. Roles are
SGLang's own --disaggregation-mode prefill | decode | null.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import psutil

from sglang_hma import config as hma_config
from sglang_hma import torch_ops
from sglang_hma.config import PAGE_TOKENS, HmaConfig, PrefillRuntime

CPU_KV_SHARE_OF_MEMORY = 0.2
SHARE_ENV = "SGLANG_HMA_SHARE"

# docs/transfer.md has the reasons. Mooncake: larger slices are faster, a peer that restarts on
# the same port is found again, a write that makes no progress ends before SGLang would drop it.
# SGLang: a decode server that was out of reach is tried again after seconds, and decode keeps a
# failed request's pages until prefill says that nothing is on its way to them.
TRANSFER_DEFAULTS = {
    "MC_TCP_SLICE_SIZE": "1048576",
    "MC_TE_METADATA_REFRESH_INTERVAL_SECONDS": "1",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "20",
    "MC_TRANSFER_TIMEOUT": "60",
    "MC_LOG_LEVEL": "WARNING",
    "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1",
    "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S": "10",
    "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "180",
}

# A server that closes an idle connection races with a client that just sent a request on it:
# the request is lost, and a router then waits minutes for the pair's other half. So the
# client must be the first to close; the router keeps idle connections for up to 90 s, cloud
# load balancers for up to 600.
KEEP_ALIVE_S = 620

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


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def parse(argv: list[str]) -> tuple[HmaConfig, list[str]]:
    """Split argv into our config and SGLang's arguments, our defaults filled in."""
    parser = _OneLineParser(add_help=False, allow_abbrev=False)
    hma_config.add_cli_args(parser)
    ours, rest = parser.parse_known_args(argv)
    unknown = [arg for arg in rest if arg.startswith("--hma-")]
    if unknown:
        fail(f"{unknown[0]} is no flag of this version; see --help")
    role = flag_value(rest, "--disaggregation-mode") or "null"
    if role not in ("prefill", "decode", "null"):
        fail(f"--disaggregation-mode is {role}: it must be prefill, decode or null")
    device = flag_value(rest, "--device") or default_device()
    if device not in ("cpu", "cuda"):
        fail(f"--device is {device}: sglang-hma serves on cpu and cuda")
    runtime, device_id = prefill_runtime(ours, role, flag_value(rest, "--device"))
    if runtime == "ttnn":
        device = "cpu"
    config = HmaConfig(
        role=role,  # type: ignore[arg-type]
        device=device,  # type: ignore[arg-type]
        kv_format=ours.hma_kv_format,
        weight_format=ours.hma_weight_format or ours.hma_kv_format,
        layers_per_send=ours.hma_layers_per_send,
        kv_checksum=ours.hma_kv_checksum == "on",
        trace=ours.hma_trace,
        prefill_runtime=runtime,
        device_id=device_id,
        torch_ops=torch_ops.needed(device),
    )
    if config.trace and not Path(config.trace).resolve().parent.is_dir():
        fail(f"--hma-trace is {config.trace}: its folder does not exist, make it first")
    check_conflicts(config, rest)
    return config, with_defaults(config, rest)


def prefill_runtime(
    ours: argparse.Namespace, role: str, device: str | None
) -> tuple[PrefillRuntime, int]:
    """What computes, and on which card."""
    chosen, device_id = ours.hma_prefill_runtime, ours.hma_device_ids
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
    if chosen == "ttnn":
        check_card(device_id or 0)
    if chosen == "reference" and device_id is not None:
        fail(f"--hma-device-ids is {device_id}, but no card computes: --hma-prefill-runtime ttnn")
    return chosen, device_id or 0


def check_card(device_id: int) -> None:
    from sglang_hma.prefill.ttnn.card import CardError, require_card

    try:
        require_card(device_id)
    except CardError as error:
        fail(str(error))


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_conflicts(config: HmaConfig, argv: list[str]) -> None:
    if config.on_card:
        for flag in ("--tp-size", "--tensor-parallel-size", "--tp"):
            if flag_value(argv, flag) not in (None, "1"):
                fail(f"{flag} is {flag_value(argv, flag)}: a Tenstorrent server has one card")
    if not config.packs_kv:
        if config.weight_format == "bfp8":
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


def with_defaults(config: HmaConfig, argv: list[str]) -> list[str]:
    """SGLang's arguments with what sglang-hma needs where the user said nothing."""
    defaults: dict[str, str] = {"--device": config.device}
    on_cpu = config.device == "cpu"
    if config.packs_kv:
        defaults |= {"--attention-backend": "hma", "--page-size": str(PAGE_TOKENS)}
    else:
        if config.role != "null":
            defaults["--page-size"] = str(PAGE_TOKENS)
        if on_cpu or config.torch_ops:
            defaults["--attention-backend"] = "torch_native"
    if on_cpu or config.torch_ops or (config.packs_kv and config.role != "decode"):
        defaults["--disable-cuda-graph"] = ""
    if config.packs_kv and config.role == "decode" and not on_cpu:
        # An ended request's extra step may write to a page that a transfer has been given since.
        defaults["--disable-overlap-schedule"] = ""
    if on_cpu:
        defaults["--sleep-on-idle"] = ""
    if on_cpu or config.torch_ops:
        defaults["--sampling-backend"] = "pytorch"
    if config.role != "null":
        transport = "mooncake_tcp" if on_cpu else "mooncake"
        defaults["--disaggregation-transfer-backend"] = transport
    if config.role == "decode":
        defaults["--disaggregation-decode-retraction-backup"] = "cpu_tensor"
    out = list(argv)
    for flag, value in defaults.items():
        if flag_value(argv, flag) is None:
            out += [flag, value] if value else [flag]
    return out


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
            ModelShape.of(model.hf_config)
        except UnsupportedModel as error:
            fail(f"{error}: serve it with --hma-prefill-runtime reference")
    for label, dim in (("head_dim", model.head_dim), ("v_head_dim", model.v_head_dim)):
        if dim % PAGE_TOKENS:
            fail(f"{name} has {label} {dim}, BFP8 tiles need a multiple of {PAGE_TOKENS}: {remedy}")
    if str(model.dtype) == "torch.float16":
        fail(f"{name} is float16: add --dtype bfloat16, K and V are kept in BFP8 and BF16")
    return model


def cpu_memory_defaults(config: HmaConfig, argv: list[str], model: Any, tp_size: int) -> list[str]:
    """A KV budget for a CPU box: a share of its memory, split between servers on it."""
    if config.device != "cpu" or any(
        flag_value(argv, flag) is not None
        for flag in ("--max-total-tokens", "--mem-fraction-static")
    ):
        return argv
    servers = max(1, int(os.environ.get(SHARE_ENV, "1")))
    budget = psutil.virtual_memory().total * CPU_KV_SHARE_OF_MEMORY / servers
    elements = model.num_hidden_layers * model.get_num_kv_heads(tp_size) * tp_size
    elements *= model.head_dim + model.v_head_dim
    bytes_per_element = 17 / 16 if config.packs_kv else model.dtype.itemsize
    tokens = int(budget / (elements * bytes_per_element)) // 1024 * 1024
    return [
        *argv,
        "--max-total-tokens",
        str(min(max(tokens, 2048), 1 << 20)),
        "--mem-fraction-static",
        "0.95",
    ]


def cpu_environment() -> None:
    """Threads that yield the cores: SGLang's servers on one box poll and compute in turns."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Early sends of a cached prefix wait on a CUDA event.
    os.environ["SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"] = "0"


def share_cores(server_args: Any) -> None:
    """Threads for each tensor-parallel rank of each server on this box."""
    servers, ranks = max(1, int(os.environ.get(SHARE_ENV, "1"))), server_args.tp_size
    cores = sorted(os.sched_getaffinity(0))
    if servers * ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores) // (servers * ranks))))
    if ranks == 1:
        return
    if ranks > len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))):
        # SGLang gives each rank a NUMA node, and refuses to start with more ranks than nodes.
        starts = [len(cores) * rank // ranks for rank in range(ranks + 1)]
        shares = [cores[a : max(a + 1, b)] for a, b in pairwise(starts)]
        bind = "|".join(",".join(map(str, share)) for share in shares)
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", bind)
    if not server_args.enable_torch_compile:
        # One small function of the sharded embedding is compiled otherwise: a minute at the start.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def print_help() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(
        prog="python -m sglang_hma.launch_server",
        description="One SGLang server with BFP8 KV pages. Roles: --disaggregation-mode prefill, "
        "decode or null (both in one server). For a prefill and a decode server with a router on "
        "one box use python -m sglang_hma.launch_pd.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hma_config.add_cli_args(parser)
    ServerArgs.add_cli_args(parser)
    parser.print_help()


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print_help()
        return
    config, rest = parse(argv)
    os.environ.update(config.environment())
    os.environ.setdefault("SGLANG_TIMEOUT_KEEP_ALIVE", str(KEEP_ALIVE_S))
    for name, value in TRANSFER_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if config.device == "cpu":
        cpu_environment()
    if config.torch_ops:
        sys.stderr.write(
            "sglang_hma.launch_server: sgl_kernel is not installed: SGLang's layers run on torch's "
            "operators, without CUDA graphs; attention is sglang-hma's own\n"
        )
    torch_ops.prepare(config)

    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from sglang_hma import seams

    try:
        seams.verify(config)
    except RuntimeError as error:
        fail(str(error))
    server_args = prepare_server_args(rest)
    model = check_model(config, server_args)
    sized = cpu_memory_defaults(config, rest, model, server_args.tp_size)
    if sized is not rest:
        server_args = prepare_server_args(sized)
    if config.device == "cpu":
        share_cores(server_args)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__mp_main__":
    # A worker process, which has imported nothing of SGLang yet.
    torch_ops.prepare(HmaConfig.from_env())
elif __name__ == "__main__":
    main()
