"""Heterogeneous prefill/decode serving on SGLang with BFP8 KV pages.

SGLang finds this package through two entry points (pyproject.toml). Both do
nothing unless `sglang_hma.launch_server` started the process tree.
"""

__version__ = "0.1.0"


def activate() -> str | None:
    """`sglang.srt.platforms` entry point: the platform class for this process."""
    from sglang_hma.config import HmaConfig

    config = HmaConfig.from_env()
    return config.platform_class if config else None


def register() -> None:
    """`sglang.srt.plugins` entry point: attach to SGLang's seams."""
    from sglang_hma.config import HmaConfig

    config = HmaConfig.from_env()
    if config is not None:
        from sglang_hma import seams

        seams.register(config)
