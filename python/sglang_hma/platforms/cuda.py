"""CUDA servers: SGLang's own CUDA platform with sglang-hma's pools and attention; or, where
sgl_kernel is not installed, an out-of-tree platform on torch's operators.

Written against SGLang 0.5.23's interfaces; no GPU has run it yet.
"""

import torch
from sglang.srt.platforms.cuda import CudaDeviceMixin, CudaSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from typing_extensions import override

from sglang_hma.platforms.common import HmaPlatformMixin


class HmaCudaPlatform(HmaPlatformMixin, CudaSRTPlatform):
    """In-tree CUDA identity, so that SGLang keeps its CUDA kernels and code paths."""


class HmaTorchCudaPlatform(HmaPlatformMixin, CudaDeviceMixin, SRTPlatform):
    """A GPU on which SGLang's layers use their native torch operators (sglang_hma.torch_ops)."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities(supports_triton=True)

    @override
    def get_default_attention_backend(self) -> str:
        return "torch_native"

    @override
    def get_dispatch_key_name(self) -> str:
        return "native"

    @override
    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        return self.get_device(local_rank)

    @override
    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"
