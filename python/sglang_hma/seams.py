"""Where sglang-hma attaches to SGLang: the hooks of seam_list, applied and verified.

SGLang logs and swallows plugin errors, so `verify` looks at each target again and stops a server
on which one did not take hold, or whose SGLang has lost or changed a method that a class of ours
overrides.
"""

import pkgutil
from importlib.metadata import version
from typing import Any

from sglang_hma import overrides, torch_ops
from sglang_hma.config import DRAFT_ALGORITHMS, HmaConfig
from sglang_hma.seam_list import SEAMS

SGLANG_VERSION = "0.5.23"
ATTENTION_BACKEND = "hma"


def register(config: HmaConfig) -> None:
    """Called by SGLang's plugin loader in every process, before anything is built."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if config.packs_kv:
        _register_attention_backend()
        _register_in_lists()
    if config.on_card:
        _register_models()
    for seam in SEAMS:
        if seam.applies(config):
            ours = seam.load()
            kind = HookType.REPLACE if isinstance(ours, type) else HookType.AROUND
            HookRegistry.register(seam.target, ours, kind)


def verify(config: HmaConfig) -> None:
    """Raise RuntimeError unless SGLang is the pinned version, every seam took hold and every
    override still fits."""
    found = version("sglang")
    if found != SGLANG_VERSION:
        raise RuntimeError(f"sglang {found} is installed, sglang-hma needs {SGLANG_VERSION}")
    lost = [
        seam.target
        for seam in SEAMS
        if seam.applies(config) and not _holds(pkgutil.resolve_name(seam.target), seam.load())
    ]
    if not _has_platform(config):
        lost.append("sglang.srt.platforms: platform 'hma'")
    if config.packs_kv and not _has_attention_backend():
        lost.append("sglang.srt.layers.attention.attention_registry: backend 'hma'")
    if config.packs_kv and not _is_in_lists():
        lost.append("sglang.srt.arg_groups.resolution_hooks: 'handle_model_specific_adjustments'")
    if config.on_card and not _has_models():
        lost.append("sglang.srt.models.registry.ModelRegistry.models")
    if torch_ops.applies(config) and not torch_ops.took_hold():
        lost.append("sglang.srt.utils.is_cuda")
    if lost:
        raise RuntimeError(
            f"SGLang's plugin loader did not apply {', '.join(lost)}; "
            "its log above says why (is another plugin installed?)"
        )
    _load_what_sglang_asks_for(config)
    changed = _changed_hooks(config) + overrides.broken()
    if changed:
        raise RuntimeError(
            f"sglang {found} is installed, but not as sglang-hma knows it: {'; '.join(changed)}; "
            f"install sglang=={SGLANG_VERSION} afresh"
        )


def _has_platform(config: HmaConfig) -> bool:
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, pkgutil.resolve_name(config.platform_class))


def _load_what_sglang_asks_for(config: HmaConfig) -> None:
    """Classes that no seam names: the platform's, the transfer's, the attention backend."""
    from sglang.srt.platforms import current_platform

    current_platform.get_kv_pool_cls(kind="mha")
    current_platform.get_paged_allocator_cls()
    if config.mixes_page_formats and config.device == "cpu":
        for algorithm in DRAFT_ALGORITHMS:
            current_platform.get_speculative_worker_cls(algorithm)
    if config.packs_kv:
        pkgutil.resolve_name("sglang_hma.attention.backend")
    if config.role != "null":
        from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class

        for kind in (KVClassType.MANAGER, KVClassType.BOOTSTRAP_SERVER):
            get_kv_class(TransferBackend.MOONCAKE, kind)


def _changed_hooks(config: HmaConfig) -> list[str]:
    found = []
    for seam in SEAMS:
        ours = seam.load() if seam.applies(config) else None
        if ours is not None and not isinstance(ours, type):
            # A wrapper has the signature of what it wraps.
            reason = overrides.mismatch(pkgutil.resolve_name(seam.target), ours, extra=1)
            found += [f"{seam.target} {reason}"] if reason else []
    return found


def _holds(current: Any, ours: Any) -> bool:
    """Whether `current` is our class, or a chain of wrappers that has our function in it."""
    while current is not None:
        cells = getattr(current, "__closure__", None) or ()
        if current is ours or any(cell.cell_contents is ours for cell in cells):
            return True
        current = getattr(current, "__wrapped__", None)
    return False


def _register_attention_backend() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    def build(runner: Any) -> Any:
        from sglang_hma.attention.backend import HmaAttnBackend

        return HmaAttnBackend(runner)

    register_attention_backend(ATTENTION_BACKEND)(build)


def _register_in_lists() -> None:
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    from sglang_hma.attention import listed

    register_resolution_hook(listed.STEP)(listed.adjust)


def _is_in_lists() -> bool:
    from sglang.srt.arg_groups import resolution_hooks

    from sglang_hma.attention import listed

    return listed.adjust in resolution_hooks._HOOKS.get(listed.STEP, ())


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

    return ATTENTION_BACKEND in ATTENTION_BACKENDS
