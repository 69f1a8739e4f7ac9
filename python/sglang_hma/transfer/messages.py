"""Messages that prefill and decode exchange in addition to SGLang's.

They travel on SGLang's control sockets as three frames: a tag, the version of this protocol, and a
msgpack struct. A decode server's `Introduction` is one frame, appended to SGLang's registration.
Peers are not trusted: every field has bounds, and whatever parses raises ValueError for anything
outside them.
"""

import ipaddress
import re
from typing import Annotated

import msgspec

from sglang_hma.transfer.prompt_logprobs import MAX_PARTS, PART_BYTES

# Raised whenever a server of the version before would misread a message or a field.
PROTOCOL = 3
VERSION = str(PROTOCOL).encode()

CLAIM_TAG = b"HMA-CLAIM"
RENEWAL_TAG = b"HMA-RENEWAL"
LANDED_TAG = b"HMA-LANDED"
RESEND_TAG = b"HMA-RESEND"
VERIFIED_TAG = b"HMA-VERIFIED"
METADATA_TAG = b"HMA-METADATA"
LOGPROBS_TAG = b"HMA-LOGPROBS"
HELLO_TAG = b"HMA-HELLO"
INTRODUCTION_TAG = b"HMA-KV"

MAX_LAYERS = 4096
MAX_PAGES = 1 << 20
MAX_ROOMS = 1 << 16
MAX_HOST = 64  # characters
_HOST = re.compile(r"[0-9A-Fa-f:.\[\]]{2,48}(%[0-9A-Za-z_.-]{1,15})?")

Layer = Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
Kind = Annotated[int, msgspec.Meta(ge=0, le=1)]  # kvcache/format.py
Page = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PAGES)]
PageCount = Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGES)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
Attempt = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
Word = Annotated[int, msgspec.Meta(ge=0)]
Host = Annotated[str, msgspec.Meta(max_length=MAX_HOST)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Format = Annotated[str, msgspec.Meta(max_length=1024)]
Port = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill, when a request arrives: I have it, and this is my control port."""

    room: Word
    host: Host
    port: Port

    def __post_init__(self) -> None:
        check_host(self.host)


class Renewal(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill, every few seconds: all of your requests that I still have."""

    rooms: Annotated[list[Word], msgspec.Meta(max_length=MAX_ROOMS)]
    host: Host
    port: Port

    def __post_init__(self) -> None:
        check_host(self.host)


class Landed(msgspec.Struct, frozen=True, array_like=True):
    """Prefill to decode: these pages of these layers have landed, and these are their digests.

    Layers and pages are counted within their kind: `first_page` is an index into the request's
    list of such pages. `digests` is [layers][K, V], flattened: integrity.digests of those pages.
    `attempt` counts how often the range was sent before.
    """

    room: Word
    generation: Word
    rank: Rank
    first_layer: Layer
    layers: Layers
    first_page: Page
    pages: PageCount
    digests: Annotated[list[Word], msgspec.Meta(max_length=2 * MAX_LAYERS)]
    attempt: Attempt
    kind: Kind = 0


class Metadata(msgspec.Struct, frozen=True, array_like=True):
    """Prefill to decode, before it says that all is sent: the digest of the request's row in the
    first `buffers` of SGLang's metadata buffers (integrity.row_digest)."""

    room: Word
    generation: Word
    rank: Rank
    buffers: Annotated[int, msgspec.Meta(ge=1, le=64)]
    digest: Word


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Prefill to decode, before it says that all is sent: a part of the logprobs of the prompt
    (prompt_logprobs.pack)."""

    room: Word
    part: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PARTS)]
    parts: Annotated[int, msgspec.Meta(ge=1, le=MAX_PARTS)]
    data: Annotated[bytes, msgspec.Meta(max_length=PART_BYTES)]


class Resend(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill: send this range again, for the `attempt`-th time; its digests differ."""

    room: Word
    generation: Word
    session: Name
    first_layer: Layer
    layers: Layers
    first_page: Page
    pages: PageCount
    attempt: Attempt
    kind: Kind = 0


class Verified(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill: every page of the request has arrived and matches its digests."""

    room: Word
    generation: Word
    session: Name


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Prefill to decode, where there is a cluster secret, when a rank has registered: I know it
    too, and am about to write from the address that this comes from."""


class Introduction(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill, with SGLang's registration: what the registered memory holds.

    `layout` is the KVFormat of its pages, `pages` how many each KV buffer of a kind has, `rows` how
    many requests each metadata buffer has room for.
    """

    layout: Format
    pages: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=2)]
    rows: Count

    def frame(self) -> bytes:
        return INTRODUCTION_TAG + b"/" + VERSION + b" " + msgspec.msgpack.encode(self)

    @classmethod
    def parse(cls, frame: bytes) -> "Introduction":
        """Raises ValueError for a malformed one, and for one of another version."""
        head, _, body = frame.partition(b" ")
        tag, _, version = head.partition(b"/")
        if tag != INTRODUCTION_TAG:
            raise ValueError("it does not say which protocol it speaks")
        check_version(version)
        return msgspec.msgpack.decode(body, type=cls)


Message = Claim | Renewal | Landed | Metadata | PromptLogprobs | Resend | Verified | Hello

TYPES: dict[bytes, type[Message]] = {
    CLAIM_TAG: Claim,
    RENEWAL_TAG: Renewal,
    LANDED_TAG: Landed,
    RESEND_TAG: Resend,
    VERIFIED_TAG: Verified,
    METADATA_TAG: Metadata,
    LOGPROBS_TAG: PromptLogprobs,
    HELLO_TAG: Hello,
}
TAGS = {kind: tag for tag, kind in TYPES.items()}


def frames(message: Message) -> list[bytes]:
    """The message as SGLang's control sockets carry it."""
    return [TAGS[type(message)], VERSION, msgspec.msgpack.encode(message)]


def parse(raw: list[bytes]) -> Message | None:
    """The message in these frames; None if the tag is not one of ours.

    Raises ValueError for a malformed one (msgspec's errors are subclasses of it), and for one of
    another version.
    """
    kind = TYPES.get(raw[0]) if raw else None
    if kind is None:
        return None
    if len(raw) != 3:
        raise ValueError(f"{raw[0].decode()} has {len(raw)} frames, not 3")
    check_version(raw[1])
    return msgspec.msgpack.decode(raw[2], type=kind)


def check_version(version: bytes) -> None:
    """Raises ValueError unless it is ours."""
    if version != VERSION:
        theirs = version.decode("ascii") if len(version) < 8 and version.isdigit() else "unknown"
        raise ValueError(
            f"the peer speaks version {theirs} of sglang-hma's transfer protocol, this server "
            f"version {PROTOCOL}: run the same sglang-hma on both sides"
        )


def check_host(host: str) -> None:
    """Raises ValueError unless it is an IP address: a name would have to be looked up."""
    if not _HOST.fullmatch(host):
        raise ValueError(f"{host[:MAX_HOST]!r} is no IP address")
    ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
