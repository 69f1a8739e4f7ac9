"""Where sglang-hma attaches to SGLang: every hook, with its reason, in one list.

docs/sglang-seams.md is this list for readers. SGLang logs and swallows plugin
errors, so `verify` looks at each target again and stops a server on which one
did not take hold.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sglang_hma import torch_ops
from sglang_hma.config import HmaConfig

SGLANG_VERSION = "0.5.23"


@dataclass(frozen=True)
class Seam:
    """One hooked SGLang object. `load` returns the class that replaces it, or the
    function that wraps it and gets the original as its first argument."""

    target: str
    reason: str
    load: Callable[[], Any]
    applies: Callable[[HmaConfig], bool]


def _from(module: str, name: str) -> Callable[[], Any]:
    return lambda: pkgutil.resolve_name(f"sglang_hma.{module}:{name}")


SEAMS = (
    Seam(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator",
        "capacity from BFP8's true bytes a token, in whole slabs",
        _from("kvcache.sizing", "HmaPoolConfigurator"),
        lambda config: config.packs_kv and not config.on_card,
    ),
    Seam(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator",
        "capacity from the card's memory",
        _from("prefill.ttnn.pool", "CardPoolConfigurator"),
        lambda config: config.on_card,
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.invariant_checker"
        ".SchedulerInvariantChecker._check_full_pool",
        "the leak check counts pages by format, and freed pages that are still on their way",
        _from("kvcache.leak_check", "check_full_pool"),
        lambda config: config.mixes_page_formats or config.sends_early,
    ),
    Seam(
        "sglang.srt.entrypoints.engine._set_envs_and_config",
        "a CPU server's processes are forked, so that SGLang is imported once",
        _from("processes", "set_envs_and_config"),
        lambda config: config.device == "cpu" and not config.on_card,
    ),
    Seam(
        "sglang.srt.disaggregation.utils.get_kv_class",
        "the KV manager: format handshake, layer-wise sending, checksums",
        _from("transfer.classes", "get_kv_class"),
        lambda config: config.role != "null",
    ),
    Seam(
        "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue",
        "tells the sender of the allocator's page holds",
        _from("transfer.prefill.queue", "HmaPrefillBootstrapQueue"),
        lambda config: config.sends_early,
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        "opens the gate behind which a prefill batch's pages leave layer by layer",
        _from("transfer.prefill.run_batch", "run_batch"),
        lambda config: config.gates_forwards,
    ),
    Seam(
        "sglang.srt.disaggregation.utils.get_pd_kv_layout",
        "publishes the KVFormat descriptor in SGLang's own handshake",
        _from("transfer.classes", "get_pd_kv_layout"),
        lambda config: config.role != "null",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue",
        "reserves pages by format and publishes the landing page",
        _from("transfer.decode.queues", "HmaDecodePreallocQueue"),
        lambda config: config.packs_kv and config.role == "decode",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodeTransferQueue",
        "unpacks the landed last page when a transfer commits",
        _from("transfer.decode.queues", "HmaDecodeTransferQueue"),
        lambda config: config.packs_kv and config.role == "decode",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.internal_state"
        ".SchedulerInternalStateController.get_internal_state",
        "formats, kernels and cards in /get_server_info",
        _from("server_info", "get_internal_state"),
        lambda config: True,
    ),
)


def register(config: HmaConfig) -> None:
    """Called by SGLang's plugin loader in every process, before anything is built."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if config.packs_kv:
        _register_attention_backend()
    if config.on_card:
        _register_models()
    for seam in SEAMS:
        if seam.applies(config):
            ours = seam.load()
            kind = HookType.REPLACE if isinstance(ours, type) else HookType.AROUND
            HookRegistry.register(seam.target, ours, kind)


def verify(config: HmaConfig) -> None:
    """Raise RuntimeError unless SGLang is the pinned version and every seam took hold."""
    found = version("sglang")
    if found != SGLANG_VERSION:
        raise RuntimeError(f"sglang {found} is installed, sglang-hma needs {SGLANG_VERSION}")
    lost = [
        seam.target
        for seam in SEAMS
        if seam.applies(config) and not _holds(pkgutil.resolve_name(seam.target), seam.load())
    ]
    if config.packs_kv and not _has_attention_backend():
        lost.append("sglang.srt.layers.attention.attention_registry: backend 'hma'")
    if config.on_card and not _has_models():
        lost.append("sglang.srt.models.registry.ModelRegistry.models")
    if config.torch_ops and not torch_ops.took_hold():
        lost.append("sglang.srt.utils.is_cuda")
    if lost:
        raise RuntimeError(
            f"SGLang's plugin loader did not apply {', '.join(lost)}; "
            "its log above says why (is another plugin installed?)"
        )


def _holds(current: Any, ours: Any) -> bool:
    """Whether `current` is our class, or a chain of wrappers that has our function in it."""
    while current is not None:
        cells = getattr(current, "__closure__", None) or ()
        if current is ours or any(cell.cell_contents is ours for cell in cells):
            return True
        current = getattr(current, "__wrapped__", None)
    return False


def _register_attention_backend() -> None:
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    def build(runner: Any) -> Any:
        from sglang_hma.attention.backend import HmaAttnBackend

        return HmaAttnBackend(runner)

    add_attention_backend_choices(["hma"])
    register_attention_backend("hma")(build)


def _register_models() -> None:
    from sglang.srt.models.registry import ModelRegistry

    from sglang_hma.prefill.ttnn.server import CardCausalLM
    from sglang_hma.prefill.ttnn.shape import ARCHITECTURES

    ModelRegistry.models.update(dict.fromkeys(ARCHITECTURES, CardCausalLM))


def _has_models() -> bool:
    from sglang.srt.models.registry import ModelRegistry

    from sglang_hma.prefill.ttnn.server import CardCausalLM
    from sglang_hma.prefill.ttnn.shape import ARCHITECTURES

    return all(ModelRegistry.models.get(name) is CardCausalLM for name in ARCHITECTURES)


def _has_attention_backend() -> bool:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return "hma" in ATTENTION_BACKENDS
