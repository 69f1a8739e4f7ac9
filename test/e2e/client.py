"""Requests as a client sends them, and what a server says once it has nothing left to do."""

import asyncio
from typing import Any

import aiohttp
import requests

from .harness import Server

DRAIN_S = 300
SURE = 0.1  # of a logprob, over the second best


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


def sure_tokens(url: str, prompt: list[int], tokens: int, sure_by: float) -> list[int]:
    """The first of a server's tokens, as long as each leads the second best by `sure_by`."""
    reply = generate(url, prompt, tokens, return_logprob=True, top_logprobs_num=2)
    margins = [
        best[0] - second[0] > sure_by for best, second in reply["meta_info"]["output_top_logprobs"]
    ]
    sure = margins.index(False) if False in margins else tokens
    return list(reply["output_ids"][:sure])


def assert_same_where_sure(url: str, exact_url: str, prompts: list[list[int]]) -> None:
    """Four tokens of a BF16 server a prompt, as long as a float32 one is sure of its own by more
    than BF16's noise."""
    compared = 0
    for prompt in prompts:
        expected = sure_tokens(exact_url, prompt, 4, SURE)
        assert output_ids(url, prompt, 4)[: len(expected)] == expected
        compared += len(expected)
    assert compared >= len(prompts)


async def all_at_once(url: str, jobs: list[tuple[list[int], int]]) -> list[tuple[int, dict]]:
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(prompt: list[int], tokens: int) -> tuple[int, dict]:
            async with session.post(f"{url}/generate", json=payload(prompt, tokens)) as reply:
                return reply.status, await reply.json(content_type=None)

        return await asyncio.gather(*(one(*job) for job in jobs))


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
        load, state = requests.get(f"{server.url}/get_load"), server.info()["internal_states"][0]
        raise AssertionError((server.name, reply.text, load.text, state))


def assert_drained(*servers: Server) -> None:
    """After the last answer every page is free."""
    for server in servers:
        flush(server)
        assert "leak" not in server.text().lower(), server.name
