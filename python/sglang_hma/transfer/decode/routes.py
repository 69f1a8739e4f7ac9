"""What a prefill server's bootstrap server answers, checked before SGLang acts on it.

SGLang reads the answer in its scheduler's thread, and an answer that does not suit it ends the
process. A decode server must outlive any.
"""

import asyncio
import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

import aiohttp
import msgspec

from sglang_hma import cluster_secret
from sglang_hma.config import MAX_OFFLOAD
from sglang_hma.transfer.bootstrap import (
    BOOT_HEADER,
    OFFLOAD_HEADER,
    SAME_FILE,
    SEAL_HEADER,
    proves,
    question,
)
from sglang_hma.transfer.limited_log import one_line
from sglang_hma.transfer.seals import seal

logger = logging.getLogger(__name__)

TIMEOUT_S = 5
MAX_BYTES = 1 << 16
MAX_RANKS = 1024
MAX_WORDS = 300  # bytes of an explanation
UNPROVEN = f"it does not prove that it knows the cluster secret: {SAME_FILE}"

Place = tuple[int, int, int, int]  # a rank by its data, context, tensor and pipeline ranks
SERVER: Place = (-1, -1, -1, -1)

Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
Port = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
OffloadBelow = Annotated[int, msgspec.Meta(ge=0, le=MAX_OFFLOAD)]
Text = Annotated[str, msgspec.Meta(max_length=1024)]
RANK_HOST = r"[A-Za-z0-9._:%-]{1,253}"


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prefill server, as SGLang 0.5.23's PrefillServerInfo describes it."""

    attn_tp_size: Size
    attn_cp_size: Size
    dp_size: Size
    pp_size: Size
    page_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None
    kv_cache_dtype: Text | None
    follow_bootstrap_room: bool
    enable_dsa_cache_layer_split: bool = False
    dsv41_spec_layout: dict[str, Any] | None = None
    kv_layout: Text | None = None
    decode_allocation_policy: Text = "early"
    enable_kv_cache_sharding: bool = False
    prefill_http_port: Port | None = None
    # Filled in by the reader.
    target_tp_rank: None = None
    target_tp_ranks: None = None
    target_cp_ranks: None = None
    target_pp_ranks: None = None
    required_dst_info_num: None = None
    required_prefill_response_num: None = None


# What `unsuitable` and the handshake look at.
CHECKED = (
    *("attn_tp_size", "attn_cp_size", "dp_size", "pp_size", "page_size", "kv_cache_dtype"),
    *("kv_layout", "enable_kv_cache_sharding", "enable_dsa_cache_layer_split"),
)


class RankRoute(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The control port of one of its ranks; SGLang's receiver adds `pp_rank`."""

    rank_ip: Annotated[str, msgspec.Meta(pattern=rf"\A{RANK_HOST}\Z")]
    rank_port: Port
    pp_rank: Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)] = 0


@dataclass(frozen=True)
class Answer:
    """`boot` says which start of the server answered; None where it does not say. Prompts of fewer
    tokens than `offload_below` are decode's. `denied` is why the rest says nothing: one of the two
    lacks the other's cluster secret."""

    route: dict[str, Any]
    boot: str | None
    offload_below: int = 0
    denied: str | None = None


def fetch(bootstrap_addr: str, place: Place = SERVER) -> Answer | None:
    """What a bootstrap server says of its prefill server or of one of its ranks. Blocks for
    TIMEOUT_S at most.

    None if it cannot be reached or does not answer with a JSON object.
    """
    try:
        return asyncio.run(_fetch(bootstrap_addr, place))
    except (aiohttp.ClientError, OSError, ValueError) as error:
        logger.debug("No route from %s yet: %r", bootstrap_addr, error)
        return None


async def _fetch(bootstrap_addr: str, place: Place) -> Answer | None:
    path = _path_of(place)
    keys = cluster_secret.keys()
    asked = seal(keys.bootstrap, question("GET", path), b"") if keys is not None else ""
    # In all: a server may also send a byte now and then.
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with (
        aiohttp.ClientSession(timeout=timeout, headers={SEAL_HEADER: asked}) as session,
        session.get(f"http://{bootstrap_addr}{path}", allow_redirects=False) as reply,
    ):
        if reply.status not in (200, HTTPStatus.UNAUTHORIZED):
            return None
        raw = b""
        async for part in reply.content.iter_any():
            raw += part
            if len(raw) > MAX_BYTES:
                return None
        if reply.status == HTTPStatus.UNAUTHORIZED:
            return Answer({}, None, denied=f"it says {one_line(raw, MAX_WORDS)}")
        if keys is not None and not proves(keys.bootstrap, asked, 200, reply.headers, raw):
            return Answer({}, None, denied=UNPROVEN)
        route = msgspec.json.decode(raw)
        if not isinstance(route, dict):
            return None
        below = msgspec.convert(reply.headers.get(OFFLOAD_HEADER, "0"), OffloadBelow, strict=False)
        return Answer(route, reply.headers.get(BOOT_HEADER), below)


def sealed_address(bootstrap_addr: str) -> str:
    """For SGLang's own question of a server: an address whose URL carries the seal, as a password.
    The answer proves nothing."""
    keys = cluster_secret.keys()
    if keys is None:
        return bootstrap_addr
    sealed = seal(keys.bootstrap, question("GET", _path_of(SERVER)), b"")
    return f"hma:{quote(sealed, safe='')}@{bootstrap_addr}"


def _path_of(place: Place) -> str:
    names = "prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"
    return "/route?" + "&".join(f"{name}={n}" for name, n in zip(names, place, strict=True))


def parse(route: dict[str, Any]) -> Route:
    """Raises ValueError, in one line, for what no prefill server would answer."""
    try:
        return msgspec.convert(route, Route)
    except msgspec.ValidationError as error:
        raise ValueError(f"its bootstrap server does not answer as SGLang's: {error}") from None


def parse_rank(info: dict[str, Any]) -> RankRoute:
    """As `parse`, of one rank."""
    try:
        return msgspec.convert(info, RankRoute)
    except msgspec.ValidationError as error:
        raise ValueError(f"no address of a rank: {error}") from None


def unsuitable(
    route: Route, *, page_size: int, kv_cache_dtype: str | None, pp_size: int, packs_kv: bool
) -> str | None:
    """Why a decode server with these settings cannot take this server's pages, or None.

    The KV formats and the sizes of attention TP are the handshake's.
    """
    for name, theirs, ours in (
        ("page size", route.page_size, page_size),
        ("KV cache dtype", route.kv_cache_dtype, kv_cache_dtype),
    ):
        if theirs != ours:
            return f"{name} mismatch: the prefill server has {theirs}, the decode server {ours}"
    for name, size, most in (
        ("context", route.attn_cp_size, 1 if packs_kv else MAX_RANKS),
        ("pipeline", route.pp_size, 1 if packs_kv else MAX_RANKS),
    ):
        if size > most:
            return f"the prefill server is {name}-parallel ({size}), which BFP8 pages do not allow"
    if pp_size not in (1, route.pp_size):
        return (
            f"pipeline parallelism is {route.pp_size} on prefill and {pp_size} on decode, which "
            "must be equal, or 1 on decode"
        )
    if packs_kv and route.dsv41_spec_layout is not None:
        return "the prefill server speculates, which BFP8 pages do not allow"
    if packs_kv and (route.enable_kv_cache_sharding or route.enable_dsa_cache_layer_split):
        return "the prefill server splits its pages or layers between ranks"
    return None
