"""Logprobs leave prefill with the metadata of the first token."""

from typing import Any

from sglang_hma.transfer import prompt_logprobs

TOP = ("output_top_logprobs_val", "output_top_logprobs_idx")


def set_buf(original: Any, buffers: Any, req: Any) -> None:
    """Around MetadataBuffers.set_buf, which is called once a prompt's last chunk is computed. It
    raises for more than 128 top logprobs, and the scheduler with it: they do not go that way."""
    top = {name: getattr(req.logprob, name) for name in TOP} if req.return_logprob else {}
    for name in top:
        setattr(req.logprob, name, [])
    try:
        original(buffers, req)
    finally:
        for name, value in top.items():
            setattr(req.logprob, name, value)
    if not req.return_logprob:
        return
    sender = req.disagg_kv_sender
    try:
        packed = prompt_logprobs.pack(req.logprob)
    except ValueError as error:
        sender.kv_mgr.fail(sender.bootstrap_room, str(error))
        return
    sender.kv_mgr.keep_logprobs(sender.bootstrap_room, packed)
    prompt_logprobs.clear(req.logprob)
