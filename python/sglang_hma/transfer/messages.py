"""Messages that prefill and decode exchange in addition to SGLang's.

They travel on SGLang's control sockets as two frames: a tag and a msgpack struct. Peers are not
trusted: every field has bounds, and `parse` raises ValueError for anything outside them.
"""

from typing import Annotated

import msgspec

CLAIM_TAG = b"HMA-CLAIM"
RENEWAL_TAG = b"HMA-RENEWAL"
LANDED_TAG = b"HMA-LANDED"
RESEND_TAG = b"HMA-RESEND"
VERIFIED_TAG = b"HMA-VERIFIED"
METADATA_TAG = b"HMA-METADATA"

MAX_LAYERS = 4096
MAX_PAGES = 1 << 20
MAX_ROOMS = 1 << 16

Layer = Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
Page = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PAGES)]
PageCount = Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGES)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
Word = Annotated[int, msgspec.Meta(ge=0)]
Host = Annotated[str, msgspec.Meta(max_length=256)]
Port = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill, when a request arrives: I have it, and this is my control port."""

    room: Word
    host: Host
    port: Port


class Renewal(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill, every few seconds: all of your requests that I still have."""

    rooms: Annotated[list[Word], msgspec.Meta(max_length=MAX_ROOMS)]
    host: Host
    port: Port


class Landed(msgspec.Struct, frozen=True, array_like=True):
    """Prefill to decode: these pages of these layers have landed, and these are their digests.

    `first_page` is an index into the request's page list. `digests` is [layers][K, V], flattened:
    integrity.digests of those pages.
    """

    room: Word
    generation: Word
    rank: Rank
    first_layer: Layer
    layers: Layers
    first_page: Page
    pages: PageCount
    digests: list[Word]


class Metadata(msgspec.Struct, frozen=True, array_like=True):
    """Prefill to decode, before it says that all is sent: the digest of the request's row in the
    first `buffers` of SGLang's metadata buffers (integrity.row_digest)."""

    room: Word
    generation: Word
    rank: Rank
    buffers: Annotated[int, msgspec.Meta(ge=1, le=64)]
    digest: Word


class Resend(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill: send this range again, its digests differ."""

    room: Word
    generation: Word
    session: Annotated[str, msgspec.Meta(max_length=256)]
    first_layer: Layer
    layers: Layers
    first_page: Page
    pages: PageCount


class Verified(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill: every page of the request has arrived and matches its digests."""

    room: Word
    generation: Word
    session: Annotated[str, msgspec.Meta(max_length=256)]


Message = Claim | Renewal | Landed | Metadata | Resend | Verified

TYPES: dict[bytes, type[Message]] = {
    CLAIM_TAG: Claim,
    RENEWAL_TAG: Renewal,
    LANDED_TAG: Landed,
    RESEND_TAG: Resend,
    VERIFIED_TAG: Verified,
    METADATA_TAG: Metadata,
}
TAGS = {kind: tag for tag, kind in TYPES.items()}


def frames(message: Message) -> list[bytes]:
    """The message as SGLang's control sockets carry it."""
    return [TAGS[type(message)], msgspec.msgpack.encode(message)]


def parse(raw: list[bytes]) -> Message | None:
    """The message in these frames; None if the tag is not one of ours.

    Raises ValueError for a malformed one (msgspec's errors are subclasses of it).
    """
    kind = TYPES.get(raw[0]) if raw else None
    if kind is None:
        return None
    if len(raw) != 2:
        raise ValueError(f"{raw[0].decode()} has {len(raw)} frames, not 2")
    return msgspec.msgpack.decode(raw[1], type=kind)
