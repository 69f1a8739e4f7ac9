"""The --hma-* flags: one typed place, parsed at the edge, read everywhere."""

import argparse
import os
from typing import Literal

import msgspec

KVFormatName = Literal["bfp8", "native"]
WeightFormatName = Literal["bfp8", "native"]
Role = Literal["prefill", "decode", "null"]
PrefillRuntime = Literal["reference", "ttnn"]

LayersPerSend = int | Literal["auto", "all"]

CONFIG_ENV = "SGLANG_HMA_CONFIG"
PAGE_TOKENS = 32

_PLATFORM_CLASSES = {
    "cpu": "sglang_hma.platforms.cpu:HmaCpuPlatform",
    "cuda": "sglang_hma.platforms.cuda:HmaCudaPlatform",
    "cuda without sgl_kernel": "sglang_hma.platforms.cuda:HmaTorchCudaPlatform",
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
    layers_per_send: LayersPerSend = "auto"
    kv_checksum: bool = True
    trace: str | None = None
    prefill_runtime: PrefillRuntime = "reference"
    device_id: int = 0  # of the Tenstorrent card
    torch_ops: bool = False  # on a GPU: SGLang's layers do without sgl_kernel

    @property
    def platform_class(self) -> str:
        without = " without sgl_kernel" if self.torch_ops else ""
        return _PLATFORM_CLASSES[self.device + without]

    @property
    def packs_kv(self) -> bool:
        return self.kv_format == "bfp8"

    @property
    def mixes_page_formats(self) -> bool:
        """Whether this server's pool holds BFP8 and BF16 pages side by side."""
        return self.packs_kv and self.role != "prefill"

    @property
    def sends_early(self) -> bool:
        """Whether pages leave while later layers still compute."""
        return self.role == "prefill" and self.layers_per_send != "all"

    @property
    def gates_forwards(self) -> bool:
        """Whether somebody wants to know when each layer of a prefill batch is stored."""
        return self.sends_early or (self.role == "prefill" and self.trace is not None)

    @property
    def on_card(self) -> bool:
        """Whether a Tenstorrent card computes; SGLang's device is the CPU then."""
        return self.prefill_runtime == "ttnn"

    @property
    def rounds_prefill_weights(self) -> bool:
        return self.weight_format == "bfp8" and self.role != "decode" and not self.on_card

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


def layers_per_send(text: str) -> LayersPerSend:
    """The value of --hma-layers-per-send; raises argparse.ArgumentTypeError."""
    if text == "auto":
        return "auto"
    if text == "all":
        return "all"
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto, all nor a number from 1")
    return int(text)


def device_id(text: str) -> int:
    """The value of --hma-device-ids; raises argparse.ArgumentTypeError."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no card number: start a server a card")
    return int(text)


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
    group.add_argument(
        "--hma-prefill-runtime",
        choices=["auto", "ttnn", "reference"],
        default="auto",
        help="What computes on a prefill server: 'ttnn' a Tenstorrent card (docs/tenstorrent.md), "
        "'reference' SGLang's own model on --device with the card's formats; 'auto' the card if "
        "this host has one, ttnn is installed and no --device says otherwise. Default: auto.",
    )
    group.add_argument(
        "--hma-device-ids",
        type=device_id,
        default=None,
        metavar="N",
        help="On a prefill server with a Tenstorrent card: the card's number under "
        "/dev/tenstorrent, one card a server. Default: 0.",
    )
    group.add_argument(
        "--hma-layers-per-send",
        type=layers_per_send,
        default="auto",
        metavar="auto|all|N",
        help="On a prefill server: how many layers' pages are collected into one write while "
        "earlier ones are on the wire. 'auto' measures the link; a number fixes it; 'all' sends "
        "nothing before the forward pass has ended, as SGLang does. Default: auto.",
    )
    group.add_argument(
        "--hma-kv-checksum",
        choices=["on", "off"],
        default="on",
        help="On a decode server: compare every page that arrives with a checksum made by the "
        "prefill server before anything reads it; what differs is sent again, then the request "
        "fails. Default: on.",
    )
    group.add_argument(
        "--hma-trace",
        metavar="FILE",
        default=None,
        help="On a prefill server: write a trace of layers computing and groups travelling to "
        "FILE, for Perfetto (ui.perfetto.dev) or chrome://tracing. Default: none.",
    )
