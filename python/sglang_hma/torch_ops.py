"""A GPU server where sgl_kernel is not installed: SGLang's layers take their torch operators.

SGLang's modules import sgl_kernel wherever `sglang.srt.utils.is_cuda()` says so, most of them
while they are imported themselves. So the answer must change before they are: in the launcher,
and in each worker process, which imports the launcher's module first.
"""

from importlib.util import find_spec
from typing import Any

from sglang_hma.config import HmaConfig

NAMES = ("is_cuda", "is_cuda_alike")


def needed(device: str) -> bool:
    return device == "cuda" and find_spec("sgl_kernel") is None


def _no() -> bool:
    return False


def prepare(config: HmaConfig | None) -> None:
    """Before any module of SGLang's layers is imported."""
    if config is None or not config.torch_ops:
        return
    for module in _modules():
        for name in NAMES:
            setattr(module, name, _no)


def took_hold() -> bool:
    """Whether the layers were imported after `prepare`."""
    from sglang.srt.layers import layernorm

    return not layernorm._is_cuda and all(
        getattr(module, name) is _no for module in _modules() for name in NAMES
    )


def _modules() -> tuple[Any, ...]:
    from sglang.srt import utils
    from sglang.srt.utils import common

    return utils, common
