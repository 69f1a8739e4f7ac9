"""SGLang's models must not write K and V into our pages themselves.

Some of them rotate K and store it in one kernel where the pool is bfloat16 on CUDA, as rows of the
model's dtype. A pool of BFP8 pages takes rows through the attention backend only.
"""

from collections.abc import Callable
from typing import Any


def enable_fused_set_kv_buffer(original: Callable[[Any], bool], forward_batch: Any) -> bool:
    """Wraps sglang.srt.models.utils.enable_fused_set_kv_buffer: the models then rotate K alone and
    let attention store it."""
    return False
