"""Servers whose layers are SGLang's torch operators though the host has a GPU: on a GPU where
sgl_kernel is not installed, and on the CPU.

SGLang's modules import sgl_kernel wherever `sglang.srt.utils.is_cuda()` says so, most of them
while they are imported themselves; it says so of the host, not of --device. So the answer must
change before they are: in the launcher, and in each worker process, which imports the launcher's
module first.
"""

import sys
from importlib.util import find_spec
from typing import Any

from sglang_hma.config import HmaConfig

NAMES = ("is_cuda", "is_cuda_alike")


def needed(device: str) -> bool:
    return device == "cuda" and find_spec("sgl_kernel") is None


def applies(config: HmaConfig) -> bool:
    return config.torch_ops or config.device == "cpu"


def _no() -> bool:
    return False


def prepare(config: HmaConfig | None) -> None:
    """Before any module of SGLang's layers is imported."""
    if config is None or not applies(config):
        return
    for module in _modules():
        for name in NAMES:
            setattr(module, name, _no)


def took_hold() -> bool:
    """Whether the layers were imported after `prepare`."""
    layernorm = sys.modules.get("sglang.srt.layers.layernorm")
    return not (layernorm and layernorm._is_cuda) and all(
        getattr(module, name) is _no for module in _modules() for name in NAMES
    )


def _modules() -> tuple[Any, ...]:
    from sglang.srt import utils
    from sglang.srt.utils import common

    return utils, common
