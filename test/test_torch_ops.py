"""Servers without sgl_kernel on a host with a GPU: their worker processes import SGLang's model
runner."""

import os

import pytest

from sglang_hma.config import HmaConfig

from .warm_python import WarmPython

# torch says that there is a Hopper GPU; the launcher's module is imported as multiprocessing does.
WORKER = """
import runpy, sys, types
import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda *_: "a GPU"
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, total_memory=1 << 36, name="a GPU"
)
sys.modules["sgl_kernel"] = None  # not installed

runpy.run_module("sglang_hma.launch_server", run_name="__mp_main__", alter_sys=True)
from sglang.srt.managers import scheduler
from sglang.srt.models import llama, qwen3
from sglang.srt.platforms import current_platform
from sglang.srt.plugins import load_plugins
from sglang_hma import seams
from sglang_hma.config import HmaConfig

load_plugins()
seams.verify(HmaConfig.require())
if HmaConfig.require().device == "cuda":
    from sglang.srt.models import qwen3_moe  # it has the hooked function by name
    qwen3_moe.enable_fused_set_kv_buffer.__globals__["_is_cuda"] = True
    assert qwen3_moe.enable_fused_set_kv_buffer(None) is False
print("platform", type(current_platform).__name__, current_platform.device_type)
"""


def test_worker_needs_no_sgl_kernel(python: WarmPython) -> None:
    config = HmaConfig(role="decode", device="cuda", torch_ops=True)
    done = python("-c", WORKER, env=os.environ | config.environment())
    assert "platform HmaTorchCudaPlatform cuda" in done.stdout, done.stderr[-3000:]


def test_a_cpu_server_beside_a_gpu_needs_none_either(python: WarmPython) -> None:
    config = HmaConfig(role="prefill", device="cpu")
    done = python("-c", WORKER, env=os.environ | config.environment())
    assert "platform HmaCpuPlatform cpu" in done.stdout, done.stderr[-3000:]


def test_sglang_itself_needs_it(python: WarmPython) -> None:
    """So the test above can fail."""
    config = HmaConfig(role="decode", device="cuda")
    done = python("-c", WORKER, env=os.environ | config.environment())
    assert "import of sgl_kernel halted" in done.stderr


@pytest.mark.parametrize(
    ("device", "installed", "needed"),
    [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)],
)
def test_chosen_where_sgl_kernel_is_missing(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: bool, needed: bool
) -> None:
    from sglang_hma import torch_ops
    from sglang_hma.launch.arguments import assume
    from sglang_hma.launch.defaults import NO_CUDA_GRAPHS, defaults

    monkeypatch.setattr(torch_ops, "find_spec", lambda _: object() if installed else None)
    config = assume(["--model-path", "m", "--device", device])
    assert config.torch_ops == needed
    if needed:
        flags = defaults(config)
        assert set(NO_CUDA_GRAPHS) <= set(flags)
        assert flags[flags.index("--sampling-backend") + 1] == "pytorch"
