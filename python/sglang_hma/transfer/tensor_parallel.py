"""Prefill and decode with different attention tensor parallelism: which rank fills what.

A BFP8 page is head-major ([kv_heads][head_dim/32][1088]) and rank r of n holds the r-th n-th
of the heads, so a page of the server with more ranks is one contiguous piece of a page of the
other's. Only TP 1 on one of the sides is supported: nothing else has been tried.
"""

from collections.abc import Sequence

from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer.grouping import Piece

MAX_TP = 1024


def unsupported(fmt: KVFormat, prefill_tp: int, decode_tp: int) -> str | None:
    """Why servers with these attention-TP sizes cannot exchange pages of `fmt`, or None."""
    if prefill_tp == decode_tp:
        return None
    most = max(prefill_tp, decode_tp)
    if min(prefill_tp, decode_tp) != 1 or most > MAX_TP:
        why = "sizes that differ work only if one of them is 1"
    elif fmt.name != "bfp8_b":
        why = f"{fmt.name} pages hold the heads of a token side by side and cannot be cut"
    elif fmt.kv_heads % most:
        why = f"{fmt.kv_heads} KV heads cannot be cut into {most} equal parts"
    else:
        return None
    return (
        f"prefill has attention TP {prefill_tp}, decode has {decode_tp}: {why}; "
        "start both with the same --tp-size"
    )


def piece(
    source: int, target: int, page_bytes: int, *, ours: tuple[int, int], theirs: tuple[int, int]
) -> Piece:
    """What one buffer of this prefill rank gives to a decode rank.

    `source` and `target` are the addresses of page 0, `page_bytes` the size of a page here;
    `ours` and `theirs` are (attention-TP rank, size). Sizes must be supported and ranks in range.
    """
    (our_rank, our_tp), (their_rank, their_tp) = ours, theirs
    if our_tp >= their_tp:
        parts = our_tp // their_tp
        place = target + our_rank % parts * page_bytes
        return Piece(source, page_bytes, place, parts * page_bytes, page_bytes)
    parts = their_tp // our_tp
    length = page_bytes // parts
    return Piece(source + their_rank % parts * length, page_bytes, target, length, length)


def check_page_bytes(
    ours: Sequence[int], theirs: Sequence[int], prefill_tp: int, decode_tp: int
) -> str | None:
    """Why a decode rank's page sizes do not fit this prefill rank's, buffer by buffer, or None."""
    for mine, other in zip(ours, theirs, strict=False):
        if mine * prefill_tp != other * decode_tp:
            return (
                f"the decode server's pages have {other} bytes at attention TP {decode_tp}, "
                f"this one's {mine} at {prefill_tp}"
            )
    return None
