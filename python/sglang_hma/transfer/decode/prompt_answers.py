"""Decode's answers with the logprobs of the prompt, which prefill has computed and sent."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, is_aborted, prepare_abort

ROWS = (
    *("input_token_logprobs_val", "input_token_logprobs_idx"),
    *("input_top_logprobs_val", "input_top_logprobs_idx"),
    *("input_token_ids_logprobs_val", "input_token_ids_logprobs_idx"),
)


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
    original(decode_req)
    if not wanted or is_aborted(req):
        return
    if found is None:
        reason = "prefill has sent no logprobs of the prompt"
        prepare_abort(req, reason, status_code=HTTPStatus.INTERNAL_SERVER_ERROR)
        return
    for name, value in found.items():
        setattr(req.logprob, name, value)


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
