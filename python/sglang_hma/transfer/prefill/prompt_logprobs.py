"""A prompt's logprobs leave prefill with the metadata of its first token."""

from typing import Any

from sglang_hma.transfer import prompt_logprobs


def set_buf(original: Any, buffers: Any, req: Any) -> None:
    """Around MetadataBuffers.set_buf, which is called once a prompt's last chunk is computed."""
    original(buffers, req)
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
