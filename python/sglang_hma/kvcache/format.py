"""KVFormat: what the bytes of a KV page mean, agreed on before any byte moves."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

from hma_kernels import GROUP, PAGE, TILE

# Kinds of pages: of layers that see all of a prompt, and, where those have a pool of their own, of
# layers that see a window of it. What there is of each kind is a sequence in this order.
FULL, WINDOW = 0, 1

VERSION = 2
_PREFIX = f"hma-kv/{VERSION}"
_TOKEN = re.compile(r"[a-z0-9_.,-]{1,32}")


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """The wire descriptor of one server's KV pages.

    `kv_heads` counts the heads of all attention-TP ranks: how many ranks share
    them is no part of the format (transfer/page_slices.py). `block` is the
    number of values that share an exponent. Layers with a window that have a pool
    of their own are the bits of the hexadecimal number `windowed`, and `window` is
    how many tokens they see before a new one; both are 0 where there is one pool.
    Two servers may exchange pages only if every field is equal.
    """

    name: str
    kv_heads: int
    head_dim: int
    v_head_dim: int
    layers: int
    page: int = PAGE
    block: int = GROUP
    tile: int = TILE
    order: str = "layer,head"
    packer: str = "device"
    window: int = 0
    windowed: str = "0"

    @property
    def most_window_pages(self) -> int:
        """Pages of a prompt that layers with a window need, at most; 0 where there is one pool."""
        return -(-self.window // self.page) + 1 if self.window else 0

    @classmethod
    def bfp8(
        cls,
        *,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        layers: int,
    ) -> Self:
        """Tiles as the vendor's device packer writes them.

        Raises ValueError if a head dim is no multiple of 32: a tile could then
        hold values of two heads.
        """
        for label, dim in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
            if dim % TILE:
                raise ValueError(f"{label} {dim} is no multiple of {TILE}, which BFP8 tiles need")
        return cls(
            name="bfp8_b",
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            layers=layers,
        )

    @classmethod
    def native(
        cls,
        *,
        dtype: str,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        layers: int,
        page: int,
    ) -> Self:
        """SGLang's own pool: rows of the model's dtype, not packed."""
        return cls(
            name=f"native-{dtype}",
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            layers=layers,
            page=page,
            block=1,
            tile=1,
            order="layer,token",
            packer="none",
        )

    @staticmethod
    def layer_mask(layers: Iterable[int]) -> str:
        """`windowed` of these layers."""
        return f"{sum(1 << layer for layer in layers):x}"

    def canonical(self) -> str:
        """The one spelling of this format, e.g. `hma-kv/2 name=bfp8_b kv_heads=8 ...`."""
        return " ".join([_PREFIX, *(f"{f.name}={getattr(self, f.name)}" for f in fields(self))])

    __str__ = canonical

    def digest(self) -> str:
        """16 hex digits of SHA-256 over `canonical()`, for logs and labels."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Inverse of `canonical()`. The text may come from a peer: raises
        ValueError for anything but a complete, well-formed descriptor."""
        if len(text) > 512:
            raise ValueError("KV format descriptor is longer than 512 characters")
        head, *items = text.split(" ")
        if head != _PREFIX:
            raise ValueError(f"KV format descriptor starts with {head[:32]!r}, not {_PREFIX!r}")
        found = dict(item.partition("=")[::2] for item in items)
        wanted = {f.name: f.type for f in fields(cls)}
        if set(found) != set(wanted) or len(items) != len(wanted):
            raise ValueError(f"KV format descriptor has fields {sorted(found)}")
        values: dict[str, int | str] = {}
        for key, value in found.items():
            if not _TOKEN.fullmatch(value):
                raise ValueError(f"KV format field {key} has the value {value[:40]!r}")
            if wanted[key] is int and not (value.isascii() and value.isdecimal()):
                raise ValueError(f"KV format field {key} is {value!r}, not a number")
            values[key] = int(value) if wanted[key] is int else value
        return cls(**values)  # type: ignore[arg-type]

    def differences(self, other: Self) -> list[str]:
        """`field: ours/theirs` for each field that differs."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name}: {ours}/{theirs}" for name, ours, theirs in pairs if ours != theirs]


def mismatch(ours: str, theirs: str | None, *, our_role: str, their_role: str) -> str | None:
    """Why two servers with these descriptors cannot exchange KV pages, or None.

    `theirs` comes from the peer and may be anything; None is a stock SGLang
    server, which publishes no descriptor.
    """
    if ours == theirs:
        return None
    if theirs is None:
        shown, detail = "no KV format (a stock SGLang server)", ""
    else:
        shown = theirs if len(theirs) <= 512 else f"{theirs[:512]}..."
        try:
            detail = "; ".join(KVFormat.parse(ours).differences(KVFormat.parse(theirs)))
        except ValueError as error:
            detail = str(error)
        detail = f" Differing ({our_role}/{their_role}): {detail}."
    return (
        f"KV format mismatch: this {our_role} server has [{ours}], "
        f"the {their_role} server has [{shown}].{detail} "
        "Start both with the same model, --hma-kv-format and --page-size, and with "
        "--disable-hybrid-swa-memory on both or on none."
    )
