"""200 concurrent requests on a pool that is too small for them, twice."""

import asyncio
import http.client
import random
import select
import time
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
import requests

from .conftest import COMMON, POOL_TOKENS
from .harness import Pair, Server, launch, output_ids, payload, running

pytestmark = pytest.mark.e2e

REQUESTS = 200


def random_jobs(seed: int, count: int) -> list[tuple[list[int], int]]:
    """(prompt, new tokens): page boundaries and long tails are frequent."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(8, 4000) for _ in range(rng.choice(LENGTHS))], rng.choice(TOKENS))
        for _ in range(count)
    ]


def test_every_request_survives_and_keeps_its_tokens(pair: Pair, seed: int) -> None:
    jobs = random_jobs(seed, REQUESTS)
    demand = sum(len(prompt) + tokens for prompt, tokens in jobs)
    assert demand > 3 * POOL_TOKENS
    quiet = [output_ids(pair.url, prompt, tokens) for prompt, tokens in jobs]
    retracted = 0
    for _ in range(2):
        replies = asyncio.run(all_at_once(pair.url, jobs))
        for (prompt, tokens), expected, (status, body) in zip(jobs, quiet, replies, strict=True):
            assert status == 200, body
            assert body["output_ids"] == expected, (len(prompt), tokens)
            retracted += body["meta_info"].get("num_retractions", 0)
    assert retracted > 0, "the pool was never too small: the test shows nothing"
    assert_drained(pair.prefill, pair.decode)


def test_idle_connections_stay_open(pair: Pair) -> None:
    """A server that closes first loses requests that a router sends at that moment."""
    links = []
    for server in (pair.prefill, pair.decode):
        url = urlsplit(server.url)
        link = http.client.HTTPConnection(str(url.hostname), url.port)
        link.request("GET", "/health")
        assert link.getresponse().read() is not None
        links.append(link)
    time.sleep(8)  # SGLang's default is 5 s
    for link in links:
        readable, _, _ = select.select([link.sock], [], [], 0)
        assert not readable, "the server closed an idle connection"
        link.close()


def test_single_server_under_pressure(single: Server, model: Path, logs: Path, seed: int) -> None:
    """Both roles in one small pool: prompts, generated pages and cached prefixes compete."""
    jobs = random_jobs(seed, 60)
    small = launch("small", model, logs, *COMMON, "--max-total-tokens", "3072")
    with running(small):
        replies = asyncio.run(all_at_once(small.url, jobs))
        undisturbed = 0
        for (prompt, tokens), (status, body) in zip(jobs, replies, strict=True):
            assert status == 200, body
            assert len(body["output_ids"]) == tokens
            # A retracted request is prefilled again, its own tokens as prompt: BFP8, not BF16.
            if body["meta_info"].get("num_retractions", 0) == 0:
                undisturbed += 1
                assert body["output_ids"] == output_ids(single.url, prompt, tokens)
        assert undisturbed > 10
        assert_drained(small)


TOKENS = [*range(2, 25, 2), 96]
LENGTHS = [1, 2, 17, 31, 32, 33, 63, 64, 65, 96, 130, 200, 257, 300]


async def all_at_once(url: str, jobs: list[tuple[list[int], int]]) -> list[tuple[int, dict]]:
    timeout = aiohttp.ClientTimeout(total=280)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(prompt: list[int], tokens: int) -> tuple[int, dict]:
            async with session.post(f"{url}/generate", json=payload(prompt, tokens)) as reply:
                return reply.status, await reply.json(content_type=None)

        return await asyncio.gather(*(one(*job) for job in jobs))


def assert_drained(*servers: Server) -> None:
    """After the last answer every page is free."""
    for server in servers:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert server.alive(), server.text()[-3000:]
            flushed = requests.post(f"{server.url}/flush_cache", timeout=30)
            if flushed.status_code == 200:
                break
            time.sleep(0.5)
        load = requests.get(f"{server.url}/get_load", timeout=30)
        state = server.info()["internal_states"][0]
        used = [v for k, v in server.metrics("sglang:num_used_tokens").items() if v]
        assert flushed.status_code == 200, (server.name, state, load.text, used)
        assert "leak" not in server.text().lower(), server.name
