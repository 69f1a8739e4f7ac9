"""Models for which SGLang has a list of attention backends, none of which is ours.

The lists name the backends that compute windows and attention sinks, and ours computes both. While
SGLang settles a server's arguments for such a model, ours is shown to it by the name of one of the
list; nothing is built then.
"""

from collections.abc import Callable
from typing import Any

OURS, LISTED = "hma", "triton"
STEP = "handle_model_specific_adjustments"
ARCHITECTURES = ("GptOssForCausalLM", "Exaone4ForCausalLM")


class _Shown:
    """SGLang's view of the arguments, our backend under another name."""

    def __init__(self, view: Any) -> None:
        self._view = view

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._view, name)
        return LISTED if value == OURS else value


def adjust(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Of SGLang's resolution step `STEP`; `previous` is the step."""
    from sglang.srt.arg_groups import model_hook

    names = model_hook.model_config_of(server_args).hf_config.architectures
    if names[0] not in ARCHITECTURES:
        return previous(server_args)
    view = model_hook.resolved_view
    model_hook.resolved_view = lambda args: _Shown(view(args))
    try:
        previous(server_args)
    finally:
        model_hook.resolved_view = view
