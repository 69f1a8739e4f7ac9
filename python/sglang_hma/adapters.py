"""LoRA adapters beside a model with our formats.

An adapter's two factors stay in the model's dtype, and their product with the input is added to
that of the base weight, which a prefill server has rounded to BFP8. In x W + x A B the two servers
have different W and the same A and B.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from sglang_hma.config import HmaConfig
from sglang_hma.prefill.weights import holds_experts

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"})
MLP = frozenset({"gate_proj", "up_proj", "gate_up_proj", "down_proj"})
IGNORED = (
    *("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"),
    *("layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
)
# Ways to begin that move a part of the base weights into the adapter.
BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Unpinned(TorchFunctionMode):
    """On a CPU alone all memory is the device's: asking for pinned memory gives plain memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{k: v for k, v in (kwargs or {}).items() if k != "pin_memory"})


def init_state(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around LoRAManager.init_state."""
    with Unpinned():
        return original(manager, *args, **kwargs)


def prepare_lora_batch(original: Any, manager: Any, forward_batch: Any) -> Any:
    """Around LoRAManager.prepare_lora_batch."""
    with Unpinned():
        return original(manager, forward_batch)


def validate_new_adapter(original: Any, manager: Any, lora_config: Any, lora_ref: Any) -> None:
    """Around LoRAManager.validate_new_adapter. Raises ValueError."""
    if left_out := ignored(lora_config.hf_config):
        raise ValueError(
            f"adapter {lora_ref.lora_name} has {left_out}, which SGLang leaves out: the answers "
            "would be another adapter's"
        )
    if HmaConfig.require().packs_kv and (changed := untried(manager.base_model, lora_config)):
        raise ValueError(
            f"adapter {lora_ref.lora_name} changes {changed}, which was not tried over weights in "
            "BFP8: serve it with --hma-kv-format native"
        )
    original(manager, lora_config, lora_ref)


def ignored(config: Mapping[str, Any]) -> str:
    """The fields of an adapter_config.json that change what is computed and that SGLang does not
    read, with their values, or ""."""
    found = [f"{name} {config[name]}" for name in IGNORED if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']}")
    began = config.get("init_lora_weights", True)
    if isinstance(began, str) and began.startswith(BASE_CHANGED):
        found.append(f"init_lora_weights {began}")
    return ", ".join(found)


def untried(model: Module, lora_config: Any) -> str:
    """Which modules an adapter changes beside those of `ATTENTION` and, in a model without experts,
    of `MLP`, or ""."""
    known = ATTENTION if any(map(holds_experts, model.modules())) else ATTENTION | MLP
    asked = lora_config.target_modules
    return str(asked) if isinstance(asked, str) else ", ".join(sorted(set(asked) - known))
