"""The --hma-* flags: one typed place, parsed at the edge, read everywhere."""

import argparse
import ipaddress
import math
import os
from typing import Literal, get_args

import msgspec

from sglang_hma import addresses

KVFormatName = Literal["bfp8", "native"]
WeightFormatName = Literal["bfp8", "native"]
WeightGroup = Literal["attention", "mlp", "experts", "head"]
Role = Literal["prefill", "decode", "null"]
PrefillRuntime = Literal["reference", "ttnn"]

OffloadThreshold = int | Literal["auto"]
DecodeCache = Literal["all", "prompt"]
LayersPerSend = int | Literal["auto", "all"]

# A mesh is a row of chips that are linked to each other.
MESHES = {"1x1": 1, "1x2": 2, "1x4": 4}

CONFIG_ENV = "SGLANG_HMA_CONFIG"
SHARE_ENV = "SGLANG_HMA_SHARE"  # how many servers share this box
ARCHITECTURES_ENV = "SGLANG_HMA_ARCHITECTURES"
MAX_OFFLOAD = 8192  # tokens that a decode server computes in one pass, at most
PAGE_TOKENS = 32  # hma_kernels.layout.PAGE, for launchers that do not import torch
MOST_DRAFT_TOKENS = 8  # hma_kernels.ops.MAX_QUERIES, likewise
DRAFT_ALGORITHMS = ("NGRAM", "STANDALONE")  # --speculative-algorithm

_PLATFORM_CLASSES = {
    "cpu": "sglang_hma.platforms.cpu:HmaCpuPlatform",
    "cuda": "sglang_hma.platforms.cuda:HmaCudaPlatform",
    "cuda without sgl_kernel": "sglang_hma.platforms.cuda:HmaTorchCudaPlatform",
}


class WeightFormats(msgspec.Struct, frozen=True):
    """Of the linear weights during prefill, by group. Routers of experts have none."""

    attention: WeightFormatName = "bfp8"
    mlp: WeightFormatName = "bfp8"
    experts: WeightFormatName = "bfp8"
    head: WeightFormatName = "bfp8"

    @classmethod
    def all(cls, name: WeightFormatName) -> "WeightFormats":
        return cls(*[name] * len(cls.__struct_fields__))

    def packs(self, group: WeightGroup) -> bool:
        return bool(getattr(self, group) == "bfp8")

    @property
    def packs_any(self) -> bool:
        return "bfp8" in msgspec.structs.astuple(self)

    def __str__(self) -> str:
        values = msgspec.structs.asdict(self)
        if len(set(values.values())) == 1:
            return self.head
        return ",".join(f"{group}={value}" for group, value in values.items())


class HmaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What this server does beyond stock SGLang.

    The launcher validates it once and puts it into the environment, because
    SGLang's worker processes load the plugin before they see any ServerArgs.
    """

    role: Role = "null"
    device: Literal["cpu", "cuda"] = "cpu"
    kv_format: KVFormatName = "bfp8"
    weight_formats: WeightFormats = WeightFormats()
    layers_per_send: LayersPerSend = "auto"
    kv_checksum: bool = True
    trace: str | None = None
    prefill_runtime: PrefillRuntime = "reference"
    device_ids: tuple[int, ...] = (0,)  # of the Tenstorrent cards
    chips: int = 1  # of those cards, in one mesh
    torch_ops: bool = False  # on a GPU: SGLang's layers do without sgl_kernel
    # Bootstrap addresses that a decode server takes pages from (addresses.canonical); None: any.
    prefill_peers: tuple[str, ...] | None = None
    # A prefill server leaves prompts of fewer tokens to decode; 0: none.
    offload_below: int = 0
    # What decode's prefix cache keeps of a request, if it has one: pages that prefill sent, or all.
    decode_cache: DecodeCache = "all"
    cluster_secret_file: str | None = None  # an absolute path
    bind: str | None = None  # the address of all ports; None: what SGLang and Mooncake choose
    drain_timeout: float = 60.0
    hang_timeout: float = 120.0

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
    def may_have_two_pools(self) -> bool:
        """Whether layers with a window may have a pool of their own (launch/windows.py)."""
        return self.packs_kv and self.role == "null" and self.device == "cpu"

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
        return self.weight_formats.packs_any and self.role != "decode" and not self.on_card

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


def offload_threshold(text: str) -> OffloadThreshold:
    """The value of --hma-offload-threshold; raises argparse.ArgumentTypeError."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdecimal()) or int(text) > MAX_OFFLOAD:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor 0 to {MAX_OFFLOAD}")
    return int(text)


def weight_formats(text: str) -> WeightFormats:
    """The value of --hma-weight-format; raises argparse.ArgumentTypeError."""
    known = get_args(WeightFormatName)
    if text in known:
        return WeightFormats.all(text)  # type: ignore[arg-type]
    chosen: dict[str, str] = {}
    for part in text.split(","):
        group, equals, value = part.partition("=")
        if not equals or group not in WeightFormats.__struct_fields__ or value not in known:
            groups = ", ".join(f"{name}=" for name in WeightFormats.__struct_fields__)
            raise argparse.ArgumentTypeError(
                f"{part!r} is neither bfp8, native nor one of {groups} with either"
            )
        chosen[group] = value
    return WeightFormats(**chosen)  # type: ignore[arg-type]


def device_ids(text: str) -> tuple[int, ...]:
    """The value of --hma-device-ids; raises argparse.ArgumentTypeError."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no card number, nor several with commas")
    ids = tuple(map(int, parts))
    if len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"{text!r} names a card twice")
    return ids


def mesh_chips(text: str) -> int:
    """Chips of a --hma-mesh; raises argparse.ArgumentTypeError."""
    if text not in MESHES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(MESHES)}")
    return MESHES[text]


def peer_address(text: str) -> str:
    """A value of --hma-prefill-peers; raises argparse.ArgumentTypeError."""
    try:
        return addresses.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def on_off(text: str) -> str:
    """The value of --hma-kv-checksum; raises argparse.ArgumentTypeError.

    YAML reads on and off as true and false.
    """
    value = {"true": "on", "false": "off"}.get(text, text)
    if value not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return value


def ip_address(text: str) -> str:
    """The value of --hma-bind; raises argparse.ArgumentTypeError."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no IP address") from None
    if address.is_unspecified:
        raise argparse.ArgumentTypeError(f"{text!r} is every address: give one of this host")
    return str(address)


def seconds(text: str) -> float:
    """The value of --hma-drain-timeout; raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def some_seconds(text: str) -> float:
    """The value of --hma-hang-timeout; raises argparse.ArgumentTypeError."""
    if seconds(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too short for an answer: give 1 or more")
    return seconds(text)


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
        type=weight_formats,
        default=None,
        metavar="bfp8|native|GROUP=...",
        help="Linear weights during prefill: 'bfp8' rounds them as a Tenstorrent card holds them, "
        "'native' keeps the checkpoint's. By group (attention, mlp, experts, head), the others in "
        "bfp8: 'head=native', 'attention=native,experts=native'. Decode always uses the "
        "checkpoint's. Default: what --hma-kv-format says.",
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
        type=device_ids,
        default=None,
        metavar="N[,N...]",
        help="On a prefill server with Tenstorrent cards: their numbers under /dev/tenstorrent. "
        "Several serve one model together, split over their chips. Default: 0.",
    )
    group.add_argument(
        "--hma-mesh",
        type=mesh_chips,
        default=None,
        metavar="|".join(MESHES),
        help="Chips of those cards that share the model: heads and MLP are split over them. Cards "
        "with two chips need it. Default: one of each card in --hma-device-ids.",
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
        "--hma-offload-threshold",
        type=offload_threshold,
        default=0,
        metavar="N|auto",
        help="On a prefill server: prompts of fewer than N tokens are computed by the decode "
        "server, with its own weights; this one answers its half of the request at once "
        "(docs/transfer.md). 'auto', with launch_pd: as many as its GPU computes while it reads "
        "the weights once. Default: 0, none.",
    )
    group.add_argument(
        "--hma-decode-cache",
        choices=get_args(DecodeCache),
        default="all",
        help="With --disaggregation-decode-enable-radix-cache: what of a request decode keeps for "
        "later ones. 'prompt': the pages that prefill sent, so that answers are those of a server "
        "without the cache; 'all': also what it generated, in BF16 and with its own weights, so "
        "that the next turn sends only what the user adds (docs/transfer.md). Default: all.",
    )
    group.add_argument(
        "--hma-kv-checksum",
        type=on_off,
        default="on",
        metavar="on|off",
        help="On a decode server: compare every page that arrives with a checksum made by the "
        "prefill server before anything reads it; what differs is sent again, then the request "
        "fails. Default: on.",
    )
    group.add_argument(
        "--hma-prefill-peers",
        type=peer_address,
        nargs="+",
        default=None,
        metavar="HOST:PORT",
        help="On a decode server: the prefill servers that it takes KV pages from, each by the "
        "host in the router's --prefill URL and its --disaggregation-bootstrap-port. A request "
        "that names another is refused. launch_pd fills it in. Default: any address that a "
        "request names is asked for pages, so let nobody but the router reach this server's port.",
    )
    group.add_argument(
        "--hma-cluster-secret-file",
        metavar="FILE",
        default=None,
        help="A secret of 32 bytes or more that all prefill and decode servers of a cluster share: "
        "who does not know it is told nothing, cannot register, write, abort or read, and control "
        "messages are encrypted (docs/security.md). Make one with (umask 077; openssl rand -hex 32 "
        "> FILE). launch_pd makes one by itself. Default: none, so let nobody but the peers reach "
        "these ports.",
    )
    group.add_argument(
        "--hma-trace",
        metavar="FILE",
        default=None,
        help="On a prefill server: write a trace of layers computing and groups travelling to "
        "FILE, for Perfetto (ui.perfetto.dev) or chrome://tracing. Default: none.",
    )
    group.add_argument(
        "--hma-bind",
        type=ip_address,
        default=None,
        metavar="ADDRESS",
        help="The one address at which this server's ports can be reached, beside loopback: "
        "control, KV transfer and rendezvous, whose makers would listen on every interface "
        "(docs/security.md). Default: --host, if that is one address.",
    )
    group.add_argument(
        "--hma-drain-timeout",
        type=seconds,
        default=60.0,
        metavar="S",
        help="After SIGTERM requests that run have so long to finish; new ones get 503 with "
        "Retry-After. A second SIGTERM or Ctrl-C to launch_pd ends all at once. Default: 60.",
    )
    group.add_argument(
        "--hma-hang-timeout",
        type=some_seconds,
        default=120.0,
        metavar="S",
        help="A server that has neither answered nor computed for so long ends, and launch_pd "
        "starts it again. A long forward pass computes. Default: 120.",
    )
