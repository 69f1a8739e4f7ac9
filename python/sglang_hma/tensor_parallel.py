"""Which tensor-parallel sizes of a prefill and a decode server go together. Without torch: the
launcher of a pair asks too."""

MAX_TP = 1024


def refuse_sizes(
    prefill_tp: int, decode_tp: int, *, page_format: str, kv_heads: int | None
) -> str | None:
    """Why servers with these attention-TP sizes cannot exchange pages, or None.

    `page_format` is KVFormat.name's, `kv_heads` counts those of all ranks, if they are known.
    """
    if prefill_tp == decode_tp:
        return None
    most = max(prefill_tp, decode_tp)
    if min(prefill_tp, decode_tp) != 1 or most > MAX_TP:
        return "sizes that differ work only if one of them is 1"
    if not page_format.startswith("bfp8"):
        return f"{page_format} pages hold the heads of a token side by side and cannot be cut"
    if kv_heads is not None and kv_heads % most:
        return f"{kv_heads} KV heads cannot be cut into {most} equal parts"
    return None
