"""Requests as a client sends them, and what a server says once it has nothing left to do."""

import asyncio
import random
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests

from .harness import Pair, Server

DRAIN_S = 300
SURE = 0.1  # of a logprob, over the second best
# In a batch of another size, float32 rounds otherwise; that may turn a rounding of K to BF16.
TIE = 2e-3
FLIPPED_ROUNDING = 0.05  # a last-bit difference in K may flip a rounding: a logit moves this far


def words(rng: random.Random, tokens: int) -> list[int]:
    """Token ids of the random models' vocabulary."""
    return [rng.randrange(8, 4000) for _ in range(tokens)]


def payload(input_ids: list[int], tokens: int = 16, **extra: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": input_ids, "sampling_params": sampling, **extra}


def generate(url: str, input_ids: list[int], tokens: int = 16, **extra: Any) -> dict[str, Any]:
    """One greedy request; raises on anything but HTTP 200."""
    reply = requests.post(f"{url}/generate", json=payload(input_ids, tokens, **extra))
    assert reply.status_code == 200, (reply.status_code, reply.text[:2000])
    return dict(reply.json())


def output_ids(url: str, input_ids: list[int], tokens: int = 16) -> list[int]:
    return list(generate(url, input_ids, tokens)["output_ids"])


def answered(pair: Pair, prompt: list[int]) -> bool:
    """A router that saw failures in a row refuses everything for some seconds."""
    return requests.post(f"{pair.url}/generate", json=payload(prompt)).status_code == 200


WITH_MARGINS = {"return_logprob": True, "top_logprobs_num": 2}


@dataclass(frozen=True, eq=False)
class Greedy:
    """A float32 server's tokens; the first `sure` of them lead the second best clearly.

    Equal to as many tokens that are the same up to there: behind a tie any answer is right.
    """

    tokens: list[int]
    sure: int

    @classmethod
    def of(cls, reply: dict[str, Any], sure_by: float = TIE) -> "Greedy":
        """From a reply to a request WITH_MARGINS."""
        margins = [
            best[0] - second[0] > sure_by
            for best, second, *_ in reply["meta_info"]["output_top_logprobs"]
        ]
        tokens = list(reply["output_ids"])
        return cls(tokens, margins.index(False) if False in margins else len(tokens))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list):
            return NotImplemented
        same = other[: self.sure] == self.tokens[: self.sure]
        return same and len(other) == len(self.tokens)

    __hash__ = None  # type: ignore[assignment]


def greedy(url: str, prompt: list[int], tokens: int = 16, sure_by: float = TIE) -> Greedy:
    return Greedy.of(generate(url, prompt, tokens, **WITH_MARGINS), sure_by)


def assert_same_where_sure(url: str, exact_url: str, prompts: list[list[int]]) -> None:
    """Four tokens of a BF16 server a prompt, as long as a float32 one is sure of its own by more
    than BF16's noise."""
    compared = 0
    for prompt in prompts:
        expected = greedy(exact_url, prompt, 4, SURE)
        assert output_ids(url, prompt, 4) == expected
        compared += expected.sure
    assert compared >= len(prompts)


async def all_at_once(url: str, jobs: list[tuple[list[int], int]]) -> list[tuple[int, dict]]:
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(prompt: list[int], tokens: int) -> tuple[int, dict]:
            async with session.post(f"{url}/generate", json=payload(prompt, tokens)) as reply:
                return reply.status, await reply.json(content_type=None)

        return await asyncio.gather(*(one(*job) for job in jobs))


async def clients_leave(
    url: str, jobs: list[tuple[list[int], int]], when: Awaitable[object]
) -> None:
    """Each job is a client's own; all close their connections after `when`."""
    clients = [asyncio.create_task(all_at_once(url, [job])) for job in jobs]
    await when
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


def load(server: Server) -> dict[str, Any]:
    """What SGLang says of a server's queues."""
    (found,) = requests.get(f"{server.url}/v1/loads", params={"include": "all"}).json()["loads"]
    return dict(found)


def flush(server: Server) -> None:
    """Empty the cache once the server has nothing to do. A request that was answered may still
    have to be concluded on prefill; SGLang flushes when it is."""
    server.check_alive()
    reply = requests.post(f"{server.url}/flush_cache", params={"timeout": DRAIN_S})
    if reply.status_code != 200:
        state = server.info()["internal_states"][0]
        raise AssertionError((server.name, reply.text, load(server), state))


def assert_drained(*servers: Server) -> None:
    """After the last answer every page is free."""
    for server in servers:
        flush(server)
        assert "leak" not in server.text().lower(), server.name
