"""A server's arguments: read before SGLang is imported, then by SGLang's own parser.

The first reading (launch/flags.py) settles what SGLang must find when it is imported: the role, the
device and the --hma-* flags. The second is SGLang's, of everything; where the two differ, the
server does not start.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from sglang_hma import config as hma_config
from sglang_hma import torch_ops
from sglang_hma.config import HmaConfig, Role, WeightFormats
from sglang_hma.launch.addresses import bind_address
from sglang_hma.launch.cards import cards, prefill_runtime
from sglang_hma.launch.checks import check_early, check_secret
from sglang_hma.launch.defaults import adapter_defaults, defaults, draft_defaults
from sglang_hma.launch.flags import CONFIG, Parser, Refusal, parser_of, read

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

ROLE, DEVICE, HOST = "--disaggregation-mode", "--device", "--host"


def assume(argv: Sequence[str]) -> HmaConfig:
    """What SGLang must find in the environment when it is imported. Raises Refusal."""
    given = read(early_parser(), argv)
    check_early(role_of(given), given, argv)
    return configure(given)


def role_of(given: argparse.Namespace) -> Role:
    role: Role = given.disaggregation_mode
    if role not in get_args(Role):
        raise Refusal(f"{ROLE} is {role}: it must be prefill, decode or null")
    return role


def is_on(switch: str, argv: Sequence[str]) -> bool:
    """Whether SGLang will find a switch of its own given. Raises Refusal."""
    given = read(parser_of(switches=[switch]), argv)
    return getattr(given, switch.removeprefix("--").replace("-", "_")) not in (None, "false")


def early_parser() -> Parser:
    parser = parser_of(DEVICE, HOST)
    parser.add_argument(ROLE, default="null")
    hma_config.add_cli_args(parser)
    return parser


def configure(given: argparse.Namespace) -> HmaConfig:
    """Role, device and --hma-* flags, checked against each other and this machine."""
    role = role_of(given)
    device = given.device or default_device()
    if device not in ("cpu", "cuda"):
        raise Refusal(f"{DEVICE} is {device}: sglang-hma serves on cpu and cuda")
    runtime = prefill_runtime(given)
    ids, chips = cards(given, runtime)
    if runtime == "ttnn":
        device = "cpu"
    trace = given.hma_trace
    if trace and not Path(trace).resolve().parent.is_dir():
        raise Refusal(f"--hma-trace is {trace}: its folder does not exist, make it first")
    formats = given.hma_weight_format or WeightFormats.all(given.hma_kv_format)
    if given.hma_kv_format == "native" and formats.packs_any:
        raise Refusal(
            f"--hma-weight-format is {formats} but --hma-kv-format is native, which switches all "
            "formats off: leave one of them out"
        )
    if given.hma_offload_threshold and given.hma_kv_format == "native":
        raise Refusal(
            f"--hma-offload-threshold is {given.hma_offload_threshold}, which a decode server with "
            "--hma-kv-format native does not know: leave one of them out"
        )
    if given.hma_offload_threshold == "auto" and role == "prefill":
        raise Refusal(
            "--hma-offload-threshold is auto: only launch_pd knows the decode servers' GPU; give "
            "a number of tokens"
        )
    return HmaConfig(
        role=role,
        device=device,  # type: ignore[arg-type]
        kv_format=given.hma_kv_format,
        weight_formats=formats,
        layers_per_send=given.hma_layers_per_send,
        kv_checksum=given.hma_kv_checksum == "on",
        trace=trace,
        prefill_runtime=runtime,
        device_ids=ids,
        chips=chips,
        torch_ops=torch_ops.needed(device),
        prefill_peers=tuple(given.hma_prefill_peers) if given.hma_prefill_peers else None,
        offload_below=given.hma_offload_threshold if role == "prefill" else 0,
        decode_cache=given.hma_decode_cache,
        cluster_secret_file=secret_file(given.hma_cluster_secret_file, role),
        bind=bind_address(given.hma_bind, given.host),
        drain_timeout=given.hma_drain_timeout,
        hang_timeout=given.hma_hang_timeout,
    )


def secret_file(path: str | None, role: str) -> str | None:
    """Of --hma-cluster-secret-file; None for a server without a peer. Raises Refusal."""
    if path is None or role == "null":
        return None
    check_secret(path)
    return str(Path(path).resolve())


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def full_parser() -> Parser:
    """SGLang's parser with the --hma-* flags in it. Imports SGLang."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.server_args import ServerArgs

    from sglang_hma.seams import ATTENTION_BACKEND

    if ATTENTION_BACKEND not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([ATTENTION_BACKEND])
    parser = Parser(
        prog="python -m sglang_hma.launch_server",
        description="One SGLang server with BFP8 KV pages. Roles: --disaggregation-mode prefill, "
        "decode or null (both in one server). For a prefill and a decode server with a router on "
        "one box use python -m sglang_hma.launch_pd.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hma_config.add_cli_args(parser)
    ServerArgs.add_cli_args(parser)
    return parser


def parse(config: HmaConfig, argv: Sequence[str]) -> "ServerArgs":
    """SGLang's arguments, our defaults filled in where the user said nothing; not resolved yet.

    Raises Refusal for what SGLang's parser refuses, and if it reads another config than `config`.
    """
    parser = full_parser()
    merged = _merge(parser, argv)
    with _quiet():
        given = parser.parse_args(merged)
    if given.config is not None:
        raise Refusal(f"{CONFIG} {given.config} would not be read: write it as two whole words")
    _same(config, configure(given))
    ours = Parser(add_help=False)
    hma_config.add_cli_args(ours)
    _, theirs = ours.parse_known_args(merged)

    from sglang.srt.server_args import prepare_server_args

    # Of two values the last one counts: a default stands before what the user gave.
    ours_first = [*defaults(config), *draft_defaults(config, given)]
    if given.enable_lora or given.lora_paths:
        ours_first += adapter_defaults(config)
    return prepare_server_args([*ours_first, *theirs])


def _merge(parser: Parser, argv: Sequence[str]) -> list[str]:
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    try:
        return ConfigArgumentMerger(parser).merge_config_with_args(list(argv))
    except (OSError, ValueError) as error:
        raise Refusal(f"{CONFIG}: {' '.join(str(error).split())}") from None


def _same(assumed: HmaConfig, found: HmaConfig) -> None:
    flags = {
        "role": ROLE,
        "device": DEVICE,
        "weight_formats": "--hma-weight-format",
        "chips": "--hma-mesh",
        "bind": f"{HOST} or --hma-bind",
    }
    for name in HmaConfig.__struct_fields__:
        before, after = getattr(assumed, name), getattr(found, name)
        if before != after:
            flag = flags.get(name, f"--hma-{name.replace('_', '-')}")
            raise Refusal(
                f"{flag} is {after} for SGLang's parser, but {before} was read before SGLang was "
                "imported: write the flag in full, on the command line"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of deprecated flags: `prepare_server_args` parses again and repeats
    them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
