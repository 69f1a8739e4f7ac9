"""Decode's answers with the logprobs that prefill has computed and sent."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, is_aborted, prepare_abort

from sglang_hma.transfer.prompt_logprobs import OF_FIRST, OF_PROMPT

ROWS = tuple(f"{kind}_{part}" for kind in OF_PROMPT for part in ("val", "idx"))
FIRST_ROWS = tuple(f"{kind}_{part}" for kind in OF_FIRST for part in ("val", "idx"))


def commit(original: Callable[[Any], None], queue: Any, decode_req: Any) -> None:
    """DecodeTransferQueue._commit_transfer_to_req, which ends the request's room: what was sent for
    it is taken before."""
    req = decode_req.req
    wanted = req.return_logprob and req.bootstrap_host != FAKE_BOOTSTRAP_HOST
    found = None
    if wanted:
        manager = decode_req.kv_receiver.kv_mgr
        vocabulary = queue.scheduler.model_config.vocab_size
        found = manager.take_logprobs(req.bootstrap_room, vocabulary)
    rows = {name: len(getattr(req.logprob, name) or ()) for name in FIRST_ROWS} if wanted else {}
    original(decode_req)
    if not wanted or is_aborted(req):
        return
    if found is None:
        reason = "prefill has sent no logprobs of the prompt"
        prepare_abort(req, reason, status_code=HTTPStatus.INTERNAL_SERVER_ERROR)
        return
    for name in ROWS:
        if name in found:
            setattr(req.logprob, name, found[name])
    for name, before in rows.items():
        given = getattr(req.logprob, name)
        # A request that was put aside keeps the row of the token that it repeats.
        if name in found and given is not None and len(given) == before + 1:
            given[-1] = found[name][0]


def commit_native(original: Any, queue: Any, decode_req: Any) -> None:
    """Around DecodeTransferQueue._commit_transfer_to_req."""
    commit(lambda each: original(queue, each), queue, decode_req)


def accept(original: Any, answers: Any, *, req: Any) -> None:
    """Around _GenerationStreamAccumulator.accept: SGLang leaves a prompt's logprobs out of what a
    decode server says. They go with a request's first row."""
    before = len(answers.rids)
    original(answers, req=req)
    if len(answers.rids) == before or not answers.return_logprob:
        return
    if not req.return_logprob or req.input_logprob_sent:
        return
    if req.logprob.input_token_logprobs_val is None:
        return
    for name in ROWS:
        getattr(answers, name)[-1] = getattr(req.logprob, name) or []
    req.input_logprob_sent = True
