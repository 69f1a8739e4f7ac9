"""CUDA servers: SGLang's own CUDA platform with sglang-hma's pools and attention.

Written against SGLang 0.5.23's interfaces; no GPU has run it yet.
"""

from sglang.srt.platforms.cuda import CudaSRTPlatform

from sglang_hma.platforms.common import HmaPlatformMixin


class HmaCudaPlatform(HmaPlatformMixin, CudaSRTPlatform):
    """In-tree CUDA identity, so that SGLang keeps its CUDA kernels and code paths."""
