"""python -m sglang_hma.launch_server: one SGLang server, prefill, decode or both.

Takes every flag of sglang.launch_server and the --hma-* flags. Roles are
SGLang's own --disaggregation-mode prefill | decode | null.
"""

import argparse
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import psutil

from sglang_hma import config as hma_config
from sglang_hma import torch_ops
from sglang_hma.config import ARCHITECTURES_ENV, PAGE_TOKENS, SHARE_ENV, HmaConfig, WeightFormats
from sglang_hma.launch.checks import (
    cards,
    check_conflicts,
    check_model,
    fail,
    flag_value,
    prefill_runtime,
)
from sglang_hma.launch.imports import before_torch, importing

CPU_KV_SHARE_OF_MEMORY = 0.2

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
    runtime = prefill_runtime(ours, role, flag_value(rest, "--device"))
    ids, chips = cards(ours, runtime)
    if runtime == "ttnn":
        device = "cpu"
    config = HmaConfig(
        role=role,  # type: ignore[arg-type]
        device=device,  # type: ignore[arg-type]
        kv_format=ours.hma_kv_format,
        weight_formats=ours.hma_weight_format or WeightFormats.all(ours.hma_kv_format),
        layers_per_send=ours.hma_layers_per_send,
        kv_checksum=ours.hma_kv_checksum == "on",
        trace=ours.hma_trace,
        prefill_runtime=runtime,
        device_ids=ids,
        chips=chips,
        torch_ops=torch_ops.needed(device),
    )
    if config.trace and not Path(config.trace).resolve().parent.is_dir():
        fail(f"--hma-trace is {config.trace}: its folder does not exist, make it first")
    check_conflicts(config, rest)
    return config, with_defaults(config, rest)


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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
    before_torch(argv)
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

    with importing():
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.launch_server import run_server
        from sglang.srt.entrypoints import http_server  # noqa: F401
        from sglang.srt.server_args import prepare_server_args
        from sglang.srt.utils import kill_process_tree

        from sglang_hma import seams

    try:
        seams.verify(config)
    except RuntimeError as error:
        fail(str(error))
    server_args = prepare_server_args(rest)
    model = check_model(config, server_args)
    os.environ[ARCHITECTURES_ENV] = ",".join(model.hf_config.architectures or ())
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
