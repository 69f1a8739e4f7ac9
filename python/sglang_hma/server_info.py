"""What /get_server_info tells beyond stock SGLang: formats, kernels and cards, under `hma`."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from hma_kernels import describe
from sglang_hma.config import HmaConfig


def get_internal_state(original: Callable[..., Any], controller: Any, recv_req: Any) -> Any:
    """SGLang's answer of a scheduler, with ours in it."""
    answer = original(controller, recv_req)
    answer.internal_state["hma"] = facts(HmaConfig.require()) | metadata_buffers(controller)
    return answer


def metadata_buffers(controller: Any) -> dict[str, Any]:
    """Where first tokens travel: a request has one until it has landed or failed."""
    of = getattr(controller.scheduler, "req_to_metadata_buffer_idx_allocator", None)
    if of is None:
        return {}
    return {"metadata_buffers": {"total": of.size, "in_use": of.size - of.available_size()}}


def facts(config: HmaConfig) -> dict[str, Any]:
    """Plain values only: they travel between processes."""
    told: dict[str, Any] = {"version": version("sglang-hma"), "kv_format": config.kv_format}
    if config.packs_kv:
        told["kernels"] = describe(torch.device(config.device)).removeprefix("kernels: ")
    if config.role != "decode":
        told["weight_format"] = str(config.weight_formats)
    if config.role == "prefill":
        told["prefill_runtime"] = config.prefill_runtime
        told["layers_per_send"] = config.layers_per_send
        told["offload_threshold"] = config.offload_below
    if config.role != "prefill":
        told["kv_checksum"] = config.kv_checksum
    if config.on_card:
        from sglang_hma.prefill.ttnn.server import CardCausalLM

        told["tenstorrent"] = CardCausalLM.serving.facts(config)
    return told
