"""SGLang's hierarchical cache on prefill: prefixes that left its pages come back from the host's
memory, byte for byte, and travel to decode as those that were computed."""

import asyncio
import contextlib
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest
import requests

from .client import (
    all_at_once,
    answered,
    assert_drained,
    flush,
    generate,
    greedy,
    payload,
    words,
)
from .conftest import COMMON, FAULTY_LINK, Faults
from .harness import Pair, launch, launch_router, running, until

PAGE, POOL_TOKENS = 32, 512
NEW_TOKENS = 12

pytestmark = [pytest.mark.e2e, pytest.mark.faults]


@pytest.fixture(scope="module")
def cached(pair: Pair, model: Path, logs: Path, faults: Faults) -> Iterator[Pair]:
    """A prefill server with a pool for two or three prompts and host memory for all, before the
    decode server of `pair`."""
    given = (*COMMON, "--max-total-tokens", str(POOL_TOKENS))
    copies = ("--enable-hierarchical-cache", "--hicache-ratio", "16")
    env = {"PYTHONPATH": str(FAULTY_LINK), "HMA_TEST_FAULTS": str(faults.file)}
    prefill = launch("host-cache", model, logs, *given, *copies, mode="prefill", env=env)
    with running(prefill):
        router = launch_router(logs, prefill, pair.decode, "host-cache-router")
        with running(router):
            yield Pair(prefill, pair.decode, router)


def test_prefixes_come_back(cached: Pair, pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [words(rng, rng.randrange(100, 300)) for _ in range(10)]
    flush(cached.prefill)
    for prompt in prompts:
        assert generate(cached.url, prompt, 2)["meta_info"]["cached_tokens"] == 0
    brought_back = 0
    for prompt in prompts:
        answer = generate(cached.url, prompt, NEW_TOKENS)
        assert answer["output_ids"] == greedy(pair.url, prompt, NEW_TOKENS), len(prompt)
        assert answer["meta_info"]["cached_tokens"] == (len(prompt) - 1) // PAGE * PAGE
        brought_back += answer["meta_info"]["cached_tokens"]
    # Not even half of that has ever been in the pool at once.
    assert brought_back > 2 * POOL_TOKENS
    # A prefix that goes on in another way.
    prompt = [*prompts[0][:96], *words(rng, 50)]
    answer = generate(cached.url, prompt, NEW_TOKENS)
    assert answer["output_ids"] == greedy(pair.url, prompt, NEW_TOKENS)
    assert answer["meta_info"]["cached_tokens"] == 96
    assert_drained(cached.prefill, cached.decode)


def test_many_at_once(cached: Pair, pair: Pair, seed: int) -> None:
    """Pages are brought back while others are on their way, and are evicted again; some clients
    leave while theirs are."""
    rng = random.Random(seed)
    stems = [words(rng, rng.randrange(64, 200)) for _ in range(6)]
    prompts = [[*rng.choice(stems), *words(rng, rng.randrange(1, 100))] for _ in range(40)]
    expected = [greedy(pair.url, prompt, NEW_TOKENS) for prompt in prompts]

    async def leave(session: aiohttp.ClientSession, prompt: list[int], after: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after):
                async with session.post(f"{cached.url}/generate", json=payload(prompt)) as reply:
                    await reply.read()

    async def everybody() -> list[tuple[int, dict]]:
        async with aiohttp.ClientSession() as session:
            leaving = [leave(session, each, rng.uniform(0.0, 0.5)) for each in prompts[::3]]
            jobs = [(each, NEW_TOKENS) for each in prompts]
            answers, _ = await asyncio.gather(
                all_at_once(cached.url, jobs), asyncio.gather(*leaving)
            )
            return answers

    for _ in range(2):
        answers = asyncio.run(everybody())
        for prompt, tokens, (status, answer) in zip(prompts, expected, answers, strict=True):
            assert status == 200, answer
            assert answer["output_ids"] == tokens, len(prompt)
    assert_drained(cached.prefill, cached.decode)


def test_prefill_is_killed(cached: Pair, pair: Pair, faults: Faults, seed: int) -> None:
    """While pages that were brought back are on their way; its next process has no copies."""
    rng = random.Random(seed)
    prompts = [words(rng, rng.randrange(100, 300)) for _ in range(4)]
    expected = [greedy(pair.url, prompt, NEW_TOKENS) for prompt in prompts]
    for prompt in [*prompts, words(rng, POOL_TOKENS - 2 * PAGE)]:
        generate(cached.url, prompt, 2)
    faults.set(hold_after=rng.randrange(6))
    with ThreadPoolExecutor(len(prompts)) as pool:
        asking = [
            pool.submit(requests.post, f"{cached.url}/generate", json=payload(each, NEW_TOKENS))
            for each in prompts
        ]
        until(faults.held.exists, cached.prefill, cached.decode)
        for process in cached.prefill.tree():
            process.send_signal(signal.SIGKILL)
        cached.prefill.popen.wait()
        faults.set()
        cached.prefill.start()
        for each, tokens in zip(asking, expected, strict=True):
            reply = each.result()
            assert reply.status_code >= 500 or reply.json()["output_ids"] == tokens, reply.text
    cached.prefill.wait_healthy()
    until(lambda: answered(cached, prompts[0]), cached.prefill, cached.decode)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate(cached.url, prompt, NEW_TOKENS)["output_ids"] == tokens, len(prompt)
    assert_drained(cached.prefill, cached.decode)
