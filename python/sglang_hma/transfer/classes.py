"""Which PD transfer classes SGLang gets from us, and which KV layout it publishes."""

from collections.abc import Callable
from typing import Any

from sglang.srt.disaggregation.utils import KVClassType, TransferBackend

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.format import KVFormat


def get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """Our classes for Mooncake, SGLang's for all else."""
    if transfer_backend == TransferBackend.MOONCAKE:
        if class_type == KVClassType.MANAGER:
            return _manager_class()
        if class_type == KVClassType.BOOTSTRAP_SERVER:
            from sglang_hma.transfer.bootstrap import HmaBootstrapServer

            return HmaBootstrapServer
        from sglang_hma.transfer.endpoints import HmaKVReceiver, HmaKVSender

        ours = {KVClassType.SENDER: HmaKVSender, KVClassType.RECEIVER: HmaKVReceiver}
        if class_type in ours:
            return ours[class_type]
    return original(transfer_backend, class_type)


def _manager_class() -> type:
    if HmaConfig.require().role == "prefill":
        from sglang_hma.transfer.prefill.manager import HmaPrefillManager

        return HmaPrefillManager
    from sglang_hma.transfer.decode.manager import HmaDecodeManager

    return HmaDecodeManager


def get_pd_kv_layout(original: Callable[..., Any], token_to_kv_pool: Any) -> str:
    """The pool's KVFormat descriptor, as both servers publish it."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_hma.kvcache.pool import Bfp8KVPool
    from sglang_hma.kvcache.two_pools import wire_format

    pool = token_to_kv_pool
    if isinstance(pool, Bfp8KVPool):
        return pool.hma_format.canonical()
    if (of_two := wire_format(pool)) is not None:
        return of_two.canonical()
    head_num = getattr(pool, "head_num", None)  # None: latent pages, the same on every rank
    heads = head_num * get_parallel().attn_tp_size if head_num is not None else 1
    return KVFormat.native(
        dtype=str(pool.dtype).removeprefix("torch."),
        kv_heads=heads,
        head_dim=getattr(pool, "head_dim", 0),
        v_head_dim=getattr(pool, "v_head_dim", 0),
        layers=pool.layer_num,
        page=pool.page_size,
    ).canonical()
