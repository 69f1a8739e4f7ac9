"""CPU servers of either role, without sgl_kernel: SGLang's native torch operators."""

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from typing_extensions import override

from sglang_hma.config import DRAFT_ALGORITHMS
from sglang_hma.platforms.common import HmaPlatformMixin


class HmaCpuPlatform(HmaPlatformMixin, CpuDeviceMixin, SRTPlatform):
    """An out-of-tree CPU: SGLang's in-tree one insists on sgl_kernel."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    @override
    def get_default_attention_backend(self) -> str:
        return "torch_native"

    @override
    def get_dispatch_key_name(self) -> str:
        return "native"

    @override
    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        if algorithm == "NGRAM":
            from sglang_hma.speculation.ngram import NgramWorker

            return NgramWorker
        if algorithm == "STANDALONE":
            from sglang_hma.speculation.draft_model import DraftModelWorker

            return DraftModelWorker
        return None

    @override
    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in DRAFT_ALGORITHMS

    @override
    def is_pin_memory_available(self, device: object = None) -> bool:
        return False
