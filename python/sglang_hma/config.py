"""The --hma-* flags: one typed place, parsed at the edge, read everywhere."""

import argparse
import os
from typing import Literal

import msgspec

KVFormatName = Literal["bfp8", "native"]
WeightFormatName = Literal["bfp8", "native"]
Role = Literal["prefill", "decode", "null"]

CONFIG_ENV = "SGLANG_HMA_CONFIG"
PAGE_TOKENS = 32

_PLATFORM_CLASSES = {
    "cpu": "sglang_hma.platforms.cpu:HmaCpuPlatform",
    "cuda": "sglang_hma.platforms.cuda:HmaCudaPlatform",
}


class HmaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What this server does beyond stock SGLang.

    The launcher validates it once and puts it into the environment, because
    SGLang's worker processes load the plugin before they see any ServerArgs.
    """

    role: Role = "null"
    device: Literal["cpu", "cuda"] = "cpu"
    kv_format: KVFormatName = "bfp8"
    weight_format: WeightFormatName = "bfp8"

    @property
    def platform_class(self) -> str:
        return _PLATFORM_CLASSES[self.device]

    @property
    def packs_kv(self) -> bool:
        return self.kv_format == "bfp8"

    @property
    def mixes_page_formats(self) -> bool:
        """Whether this server's pool holds BFP8 and BF16 pages side by side."""
        return self.packs_kv and self.role != "prefill"

    @property
    def rounds_prefill_weights(self) -> bool:
        return self.weight_format == "bfp8" and self.role != "decode"

    def environment(self) -> dict[str, str]:
        """What a process of this server needs in its environment."""
        return {CONFIG_ENV: msgspec.json.encode(self).decode(), "SGLANG_PLATFORM": "hma"}

    @classmethod
    def from_env(cls) -> "HmaConfig | None":
        text = os.environ.get(CONFIG_ENV)
        return msgspec.json.decode(text, type=cls) if text else None

    @classmethod
    def require(cls) -> "HmaConfig":
        config = cls.from_env()
        if config is None:
            raise RuntimeError(
                f"{CONFIG_ENV} is not set: start the server with python -m sglang_hma.launch_server"
            )
        return config


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sglang-hma", "Heterogeneous prefill/decode with BFP8 KV pages (docs/quickstart.md)"
    )
    group.add_argument(
        "--hma-kv-format",
        choices=["bfp8", "native"],
        default="bfp8",
        help="KV pages of the prompt: 'bfp8' keeps and ships the raw block-float bytes (8.5 bits "
        "an element), 'native' switches all of sglang-hma's formats off and uses SGLang's own pool "
        "in the model's dtype, for baselines. Prefill and decode must agree. Default: bfp8.",
    )
    group.add_argument(
        "--hma-weight-format",
        choices=["bfp8", "native"],
        default=None,
        help="Linear weights during prefill: 'bfp8' rounds them as a Tenstorrent card holds them, "
        "'native' keeps the checkpoint's. Decode always uses the checkpoint's. "
        "Default: what --hma-kv-format says.",
    )
