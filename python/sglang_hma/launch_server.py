"""python -m sglang_hma.launch_server: one SGLang server, prefill, decode or both.

Takes every flag of sglang.launch_server and the --hma-* flags. Roles are
SGLang's own --disaggregation-mode prefill | decode | null.
"""

import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_hma import torch_ops
from sglang_hma.config import HmaConfig
from sglang_hma.launch import arguments, checks, defaults, environment
from sglang_hma.launch.flags import Refusal
from sglang_hma.launch.model import check_draft_model, check_model
from sglang_hma.transfer import own_processes

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


def prepare(argv: Sequence[str]) -> "ServerArgs":
    """Resolved arguments of a server, with this process ready to run it. Raises Refusal.

    What can be refused is refused as early as it can be known.
    """
    environment.prepare_early()
    own_processes.prepare()
    config = arguments.assume(argv)
    environment.prepare(
        config,
        metrics=arguments.is_on("--enable-metrics", argv),
        compiles=arguments.is_on("--enable-torch-compile", argv),
    )
    torch_ops.prepare(config)
    server_args = arguments.parse(config, argv)
    checks.check_arguments(config, server_args)
    model = check_model(config, server_args)
    drafter = check_draft_model(server_args, model) if config.packs_kv else None
    models = [model] if drafter is None else [model, drafter]
    environment.serve_models(models)
    if config.torch_ops:
        sys.stderr.write(
            "sglang_hma.launch_server: sgl_kernel is not installed: SGLang's layers run on torch's "
            "operators, without CUDA graphs; attention is sglang-hma's own\n"
        )

    from sglang.srt.plugins import load_plugins

    from sglang_hma import seams

    # It lists all that it finds and applies; `verify` looks at what must not be missing.
    logging.getLogger("sglang.srt.plugins").setLevel(logging.WARNING)
    load_plugins()
    try:
        seams.verify(config)
    except RuntimeError as error:
        raise Refusal(str(error)) from error
    if config.device == "cpu":
        defaults.size_pool(config, server_args, *models)
        environment.share_cores(server_args)
    environment.keep_ranks_inside(server_args)
    checks.resolve(config, server_args)
    return server_args


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        arguments.full_parser().print_help()
        return
    # Collections would go through a million objects of imported modules and find little.
    gc.disable()
    try:
        server_args = prepare(argv)
    except Refusal as refusal:
        sys.stderr.write(f"sglang_hma.launch_server: error: {refusal}\n")
        raise SystemExit(2) from None

    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    from sglang_hma.launch import http_app  # noqa: F401

    gc.enable()
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__mp_main__":
    # A worker process, which has imported nothing of SGLang yet.
    torch_ops.prepare(HmaConfig.from_env())
elif __name__ == "__main__":
    main()
