"""Which requests are decode's, and what prefill's tokenizer process does with them."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

from sglang_hma.config import CONFIG_ENV, HmaConfig
from sglang_hma.transfer.request_fields import FAKE_HOST
from sglang_hma.transfer.short_prompts import is_short, send_batch_request, send_one_request

from .tokenized import tokenized

BELOW = 64


@pytest.fixture(autouse=True)
def config(monkeypatch: pytest.MonkeyPatch) -> None:
    made = HmaConfig(role="prefill", offload_below=BELOW)
    monkeypatch.setenv(CONFIG_ENV, made.environment()[CONFIG_ENV])


def request(tokens: int, rid: str = "r", **fields: Any) -> TokenizedGenerateReqInput:
    return tokenized([1] * tokens, rid=rid, **fields)


@given(tokens=st.integers(0, 200), below=st.integers(0, 200))
def test_only_the_number_counts(tokens: int, below: int) -> None:
    """The same for what prefill has tokenized and what decode's scheduler has of it."""
    scheduled = SimpleNamespace(return_logprob=False, input_embeds=None, bootstrap_host="10.0.0.1")
    for each in (request(tokens), scheduled):
        assert is_short(each, tokens, below) == (1 <= tokens < below)


@pytest.mark.parametrize(
    "fields", [{"return_logprob": True}, {"input_embeds": [[0.0]]}, {"bootstrap_host": FAKE_HOST}]
)
def test_never_short(fields: dict[str, Any]) -> None:
    assert not is_short(request(1, **fields), 1, BELOW)


class Manager:
    """Stands for SGLang's TokenizerManager: what became of each request. A request's waiter looks
    for its state when it has been sent, as SGLang's does."""

    def __init__(self, *rids: str) -> None:
        self.rid_to_state = {rid: SimpleNamespace(out_list=[]) for rid in rids}
        self.scheduled: list[str] = []

    async def send_one(self, _: Any, each: Any) -> None:
        self.scheduled.append(each.rid)

    async def send_batch(self, _: Any, batch: list[Any]) -> None:
        await asyncio.sleep(0)  # as where features are put into shared memory
        self.scheduled += [each.rid for each in batch]

    def _handle_abort_req(self, echo: Any) -> None:
        state = self.rid_to_state.pop(echo.rid)
        state.out_list.append({"meta_info": {"finish_reason": echo.finished_reason}})


def answer(state: Any) -> dict[str, Any]:
    (out,) = state.out_list
    return dict(out["meta_info"])


ENDED = {"finish_reason": {"type": "length", "length": 0}, "cached_tokens": 0}


def test_one_is_answered_when_somebody_waits_for_it() -> None:
    manager = Manager("short", "long")

    async def serve(tokens: int, rid: str) -> Any:
        await send_one_request(manager.send_one, manager, request(tokens, rid))
        state = manager.rid_to_state[rid]
        await asyncio.sleep(0)
        return state

    assert answer(asyncio.run(serve(BELOW - 1, "short"))) == ENDED | {"prompt_tokens": BELOW - 1}
    assert asyncio.run(serve(BELOW, "long")).out_list == []
    assert manager.scheduled == ["long"]


def test_of_several_in_one_the_others_are_scheduled() -> None:
    manager = Manager("a", "b", "c")

    async def serve() -> list[Any]:
        batch = [request(3, "a"), request(BELOW, "b"), request(5, "c")]
        await send_batch_request(manager.send_batch, manager, batch)
        states = [manager.rid_to_state[each.rid] for each in batch]
        await asyncio.sleep(0)
        return states

    a, b, c = asyncio.run(serve())
    assert manager.scheduled == ["b"] and b.out_list == []
    assert [answer(each)["prompt_tokens"] for each in (a, c)] == [3, 5]


def test_a_client_that_has_gone_is_nobody() -> None:
    manager = Manager("short")

    async def serve() -> None:
        await send_one_request(manager.send_one, manager, request(3, "short"))
        del manager.rid_to_state["short"]
        await asyncio.sleep(0)

    asyncio.run(serve())
    assert manager.scheduled == []
