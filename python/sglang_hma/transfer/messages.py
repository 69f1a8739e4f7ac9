"""What prefill and decode tell each other about groups of pages, beside SGLang's messages.

Frames on SGLang's own control sockets: a tag, then one msgpack struct. All of it
comes from a peer, so every field has a bound and `parse` raises ValueError for
anything else.
"""

from typing import Annotated

import msgspec

CLAIM_TAG = b"HMA-CLAIM"
HELD_TAG = b"HMA-HELD"
GROUP_TAG = b"HMA-GROUP"
RESEND_TAG = b"HMA-RESEND"
VERIFIED_TAG = b"HMA-VERIFIED"

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
    """Decode to prefill, as soon as it has a request: it is mine, and this is my control port."""

    room: Word
    host: Host
    port: Port


class Held(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill, every few seconds: all requests of yours that I still have."""

    rooms: Annotated[list[Word], msgspec.Meta(max_length=MAX_ROOMS)]
    host: Host
    port: Port


class Group(msgspec.Struct, frozen=True, array_like=True):
    """Prefill to decode: these pages of these layers have landed; this is what they hash to.

    `first_page` counts in the request's own page list. `digests` is [layers][K, V] flattened,
    integrity.digest of those pages' bytes.
    """

    room: Word
    generation: Word
    rank: Rank
    first_layer: Layer
    layers: Layers
    first_page: Page
    pages: PageCount
    digests: list[Word]


class Resend(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill: write this range once more, its bytes did not match."""

    room: Word
    generation: Word
    session: Annotated[str, msgspec.Meta(max_length=256)]
    first_layer: Layer
    layers: Layers
    first_page: Page
    pages: PageCount


class Verified(msgspec.Struct, frozen=True, array_like=True):
    """Decode to prefill: every page of the request is there and matches."""

    room: Word
    generation: Word
    session: Annotated[str, msgspec.Meta(max_length=256)]


Message = Claim | Held | Group | Resend | Verified

TYPES: dict[bytes, type[Claim] | type[Held] | type[Group] | type[Resend] | type[Verified]] = {
    CLAIM_TAG: Claim,
    HELD_TAG: Held,
    GROUP_TAG: Group,
    RESEND_TAG: Resend,
    VERIFIED_TAG: Verified,
}
TAGS = {kind: tag for tag, kind in TYPES.items()}


def frames(message: Message) -> list[bytes]:
    """The message as SGLang's control sockets carry it."""
    return [TAGS[type(message)], msgspec.msgpack.encode(message)]


def parse(raw: list[bytes]) -> Message | None:
    """The message in these frames, None if they are none of ours.

    Raises ValueError (of which msgspec's errors are a kind) for a broken one.
    """
    kind = TYPES.get(raw[0]) if raw else None
    if kind is None:
        return None
    if len(raw) != 2:
        raise ValueError(f"{raw[0].decode()} has {len(raw)} frames, not 2")
    return msgspec.msgpack.decode(raw[1], type=kind)
