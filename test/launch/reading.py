"""A server's arguments as its launcher reads them."""

from typing import Any

import pytest

from sglang_hma.config import HmaConfig
from sglang_hma.launch import arguments, checks
from sglang_hma.launch.flags import Refusal, read

CPU = ("--model-path", "m", "--device", "cpu")
PREFILL = ("--disaggregation-mode", "prefill")
DECODE = ("--disaggregation-mode", "decode")
STANDALONE = (
    *("--speculative-algorithm", "STANDALONE"),
    *("--speculative-draft-model-path", "small"),
)
NATIVE = ("--hma-kv-format", "native")


def start(*argv: str) -> tuple[HmaConfig, Any]:
    """The launcher's reading of `argv`, as far as it needs neither a model nor the platform, and
    without the early look at words."""
    config = arguments.configure(read(arguments.early_parser(), argv))
    server_args = arguments.parse(config, argv)
    checks.check_arguments(config, server_args)
    return config, server_args


def refusal(*argv: str) -> str:
    with pytest.raises(Refusal) as refused:
        start(*argv)
    message = str(refused.value)
    assert message and "\n" not in message
    return message
