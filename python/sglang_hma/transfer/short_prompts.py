"""Prompts too short to be worth sending (--hma-offload-threshold): decode computes them itself.

SGLang's router sends each request to both servers and waits for both. The two agree by one rule,
`is_short`, and one number, which is the prefill server's: its bootstrap server says it to each
decode server. Prefill answers its half of such a request at once, in the process that has
tokenized it, with no token; decode runs the other half as a server with both roles would
(decode/local_prefill.py), with its own weights.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sglang_hma.config import HmaConfig
from sglang_hma.transfer.request_fields import FAKE_HOST


def is_short(request: Any, tokens: int, below: int) -> bool:
    """Whether decode computes a prompt of so many tokens.

    `request` is SGLang's TokenizedGenerateReqInput or the scheduler's Req of it. One that asks for
    logprobs is not: the router puts them together from both answers.
    """
    return (
        0 < tokens < below
        and not request.return_logprob
        and request.input_embeds is None
        and request.bootstrap_host != FAKE_HOST
    )


async def send_one_request(
    original: Callable[[Any, Any], Awaitable[None]], manager: Any, tokenized_obj: Any
) -> None:
    """Around TokenizerManager._send_one_request of a prefill server."""
    if _is_decodes(tokenized_obj):
        _answer_soon(manager, tokenized_obj)
    else:
        await original(manager, tokenized_obj)


async def send_batch_request(
    original: Callable[[Any, Any], Awaitable[None]], manager: Any, tokenized_objs: Sequence[Any]
) -> None:
    """Around TokenizerManager._send_batch_request of a prefill server."""
    others = [each for each in tokenized_objs if not _is_decodes(each)]
    if others:
        await original(manager, others)
    for each in tokenized_objs:
        if _is_decodes(each):
            _answer_soon(manager, each)


def _is_decodes(request: Any) -> bool:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    if not isinstance(request, TokenizedGenerateReqInput) or request.input_ids is None:
        return False
    return is_short(request, len(request.input_ids), HmaConfig.require().offload_below)


def _answer_soon(manager: Any, request: Any) -> None:
    """As SGLang answers a request that ends before it has run, but this one has not failed. SGLang
    begins to wait for the answer in the same step of the event loop, and must have begun."""
    asyncio.get_running_loop().call_soon(_answer, manager, request.rid, len(request.input_ids))


def _answer(manager: Any, rid: str, tokens: int) -> None:
    from sglang.srt.managers.io_struct import AbortReq

    state = manager.rid_to_state.get(rid)
    if state is None:
        return  # its client has gone
    ended = {"type": "length", "length": 0}
    manager._handle_abort_req(AbortReq(rid=rid, finished_reason=ended))
    state.out_list[-1]["meta_info"] |= {"prompt_tokens": tokens, "cached_tokens": 0}
