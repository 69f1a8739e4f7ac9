"""A prefix cache on decode: the next turn of a conversation sends what decode lacks, and nothing
else changes. In a pool that is too small, with clients that leave and writes that fail."""

import asyncio
import random
import signal
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from benchmark.models.truth import Conversation, Truth

from .client import (
    FLIPPED_ROUNDING,
    all_at_once,
    answered,
    assert_drained,
    generate,
    greedy,
    output_ids,
    payload,
    words,
)
from .conftest import COMMON, FAULTY_LINK, Faults
from .harness import Pair, launch, running_behind, until

PAGE = 32
PAGE_BYTES = 4 * 4 * 64 * PAGE * 2 * 1.0625  # of K and V of all layers, in BFP8
POOL_TOKENS = 3072
TURNS = 6

pytestmark = [pytest.mark.e2e, pytest.mark.faults]


@dataclass(frozen=True)
class Caching:
    """One prefill server, and a pair with it for each --hma-decode-cache."""

    all: Pair
    prompt: Pair

    def drained(self) -> None:
        assert_drained(self.all.prefill, self.all.decode, self.prompt.decode)


@pytest.fixture(scope="module")
def caching(model: Path, logs: Path, faults: Faults) -> Iterator[Caching]:
    env = {"PYTHONPATH": str(FAULTY_LINK), "HMA_TEST_FAULTS": str(faults.file)}
    prefill = launch("dc-prefill", model, logs, *COMMON, mode="prefill", env=env)
    small = ("--max-total-tokens", str(POOL_TOKENS), "--num-reserved-decode-tokens", "1")
    decodes = {}
    for keeps in ("all", "prompt"):
        flags = ("--disaggregation-decode-enable-radix-cache", "--hma-decode-cache", keeps)
        given = (*COMMON, *small, *flags)
        decodes[keeps] = launch(f"dc-{keeps}", model, logs, *given, mode="decode", env=env)
    with running_behind(prefill, decodes) as pairs:
        yield Caching(**pairs)


def pages_sent(pair: Pair) -> float:
    return pair.prefill.metric("sglang:kv_transfer_total_mb_sum") * 2**20 / PAGE_BYTES


def test_a_conversation(caching: Caching, pair: Pair, seed: int) -> None:
    """With prompts kept, the tokens of a pair that keeps none. Bytes: exactly the pages that decode
    lacks."""
    rng = random.Random(seed)
    prompt, kept = words(rng, rng.randrange(100, 200)), 0
    for turn in range(TURNS):
        tokens = rng.randrange(1, 70)
        expected = greedy(pair.url, prompt, tokens)
        answer = next_turn(caching.prompt, prompt, tokens, kept)
        assert answer["output_ids"] == expected, turn
        kept = len(prompt) // PAGE
        # Behind a tie the two may have said something else.
        said = answer["output_ids"][: expected.sure]
        prompt = [*prompt, *said, *words(rng, rng.choice([1, 20, 32, 90]))]
    caching.drained()


def test_a_conversation_with_all_kept(caching: Caching, model: Path, seed: int) -> None:
    """Decode attends its own K and V of what it said, prefill has computed its own of it."""
    rng = random.Random(seed)
    truth = Truth.of(model)
    conversation = Conversation(truth)
    prompt, kept = words(rng, rng.randrange(100, 200)), 0
    found: list[float] = []
    without: list[float] = []
    for _ in range(TURNS):
        tokens = rng.randrange(2, 70)
        answer = next_turn(caching.all, prompt, tokens, kept, return_logprob=True)
        said = answer["output_ids"]
        own = torch.tensor([each[0] for each in answer["meta_info"]["output_token_logprobs"]])
        rows = range(tokens)
        expected = conversation.logprobs(prompt, said, kept * PAGE)
        assert float((expected.max(-1).values - expected[rows, said]).max()) < FLIPPED_ROUNDING
        found += (own - expected[rows, said]).abs().tolist()
        if kept:
            nothing_kept = truth.bfp8(prompt, said)[len(prompt) - 1 :]
            without += (own - nothing_kept[rows, said])[1:].abs().tolist()
        # The last token has no K and V yet.
        prompt, kept = [*prompt, *said], (len(prompt) + tokens - 1) // PAGE
        prompt += words(rng, rng.choice([1, 20, 32, 90]))
    assert max(found) < FLIPPED_ROUNDING
    # A flipped rounding stays in the cache, so that all later turns show it.
    assert 5 * statistics.median(found) < statistics.median(without)
    caching.drained()


def next_turn(
    asked: Pair, prompt: list[int], tokens: int, kept: int, **extra: Any
) -> dict[str, Any]:
    """An answer, for which exactly the pages have been sent that decode has not `kept`; the last
    page of a prompt always travels."""
    before = pages_sent(asked)
    answer = generate(asked.url, prompt, tokens, **extra)
    assert answer["meta_info"]["prompt_tokens"] == len(prompt)
    pages = -(-len(prompt) // PAGE) - min(kept, (len(prompt) - 1) // PAGE)
    assert pages_sent(asked) - before == pytest.approx(pages, abs=0.01)
    return answer


@pytest.mark.parametrize("tokens", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
def test_the_same_prompt_again(caching: Caching, pair: Pair, tokens: int, seed: int) -> None:
    """Of one that is cached to its end, the last page travels again."""
    prompt = words(random.Random(seed), tokens)
    expected = greedy(pair.url, prompt)
    for again in range(3):
        before = pages_sent(caching.all)
        assert output_ids(caching.all.url, prompt) == expected
        pages = -(-tokens // PAGE) if again == 0 else 1
        assert pages_sent(caching.all) - before == pytest.approx(pages, abs=0.01)
    caching.drained()


@pytest.mark.parametrize("keeps", ["all", "prompt"])
def test_many_conversations_in_a_full_pool(
    caching: Caching, pair: Pair, keeps: str, seed: int
) -> None:
    """More than there is room for: prefixes are evicted, requests are put aside and go on with the
    pages that they had."""
    rng = random.Random(seed)
    asked = getattr(caching, keeps)
    prompts = [words(rng, rng.randrange(20, 250)) for _ in range(20)]
    for _ in range(2):
        jobs = [(prompt, rng.randrange(1, 120)) for prompt in prompts]
        expected = [greedy(pair.url, *job) for job in jobs] if keeps == "prompt" else None
        answers = asyncio.run(all_at_once(asked.url, jobs))
        refused = [(i, *answer) for i, answer in enumerate(answers) if answer[0] != 200]
        assert not refused, (len(refused), refused[:2])
        said = [list(answer["output_ids"]) for _, answer in answers]
        assert [len(each) for each in said] == [tokens for _, tokens in jobs]
        assert expected is None or said == expected
        pairs = zip(prompts, said, strict=True)
        prompts = [[*prompt, *more, *words(rng, 9)] for prompt, more in pairs]
    assert "Retract requests" in asked.decode.text()
    caching.drained()


def test_a_prompt_that_fits_only_without_what_is_cached_of_it(caching: Caching, seed: int) -> None:
    """What was generated lies in BF16: in two of the pool's three slabs, and the rest of the prompt
    would take two more. Without the cache it takes two for all, and one for its last page."""
    rng = random.Random(seed)
    prompt = words(rng, 40)
    for _ in range(3):
        prompt += output_ids(caching.all.url, prompt, 250)
    prompt += words(rng, 62 * PAGE - len(prompt))
    before = pages_sent(caching.all)
    assert len(output_ids(caching.all.url, prompt, 4)) == 4
    assert pages_sent(caching.all) - before == pytest.approx(len(prompt) // PAGE, abs=0.01)
    caching.drained()


def test_clients_that_leave_and_writes_that_fail(
    caching: Caching, pair: Pair, faults: Faults, seed: int
) -> None:
    """In the middle of a turn's transfer: nothing of it is kept, and what was kept before is
    right afterwards."""
    rng = random.Random(seed)
    asked = caching.prompt
    begun = [words(rng, rng.randrange(64, 200)) for _ in range(8)]
    for prompt in begun:
        output_ids(asked.url, prompt, 2)
    turns = [prompt + words(rng, 150) for prompt in begun]
    expected = [greedy(pair.url, prompt) for prompt in turns]
    faults.set(hold_after=rng.randrange(10))

    async def leave() -> None:
        jobs = [asyncio.create_task(all_at_once(asked.url, [(turn, 400)])) for turn in turns]
        await asyncio.to_thread(until, faults.held.exists, asked.prefill, asked.decode)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    asyncio.run(leave())
    faults.set(flip=0.02, flip_rows=0.02)
    answers = asyncio.run(all_at_once(asked.url, [(turn, 16) for turn in turns]))
    for (status, body), tokens in zip(answers, expected, strict=True):
        assert status >= 500 or body["output_ids"] == tokens
    faults.set()
    until(lambda: answered(asked, turns[0]), asked.prefill, asked.decode)
    assert [output_ids(asked.url, turn) for turn in turns] == expected
    caching.drained()


def test_prefill_is_killed(caching: Caching, pair: Pair, faults: Faults, seed: int) -> None:
    """In the middle of a turn's transfer. Decode keeps what came before, and a new process sends
    the rest. Few and short: the pool has room beside all that failed and is not yet given back."""
    rng = random.Random(seed)
    asked = caching.prompt
    begun = [words(rng, rng.randrange(64, 100)) for _ in range(3)]
    for prompt in begun:
        output_ids(asked.url, prompt, 2)
    *turns, later = [prompt + words(rng, 60) for prompt in begun]
    expected = [greedy(pair.url, turn) for turn in turns]
    faults.set(hold_after=rng.randrange(2))
    with ThreadPoolExecutor(len(turns)) as pool:
        asking = [
            pool.submit(requests.post, f"{asked.url}/generate", json=payload(turn))
            for turn in turns
        ]
        until(faults.held.exists, asked.prefill, asked.decode)
        for process in asked.prefill.tree():
            process.send_signal(signal.SIGKILL)
        asked.prefill.popen.wait()
        faults.set()
        asked.prefill.start()
        for each, tokens in zip(asking, expected, strict=True):
            reply = each.result()
            assert reply.status_code >= 500 or reply.json()["output_ids"] == tokens, reply.text
    asked.prefill.wait_healthy()
    until(lambda: answered(asked, turns[0]), asked.prefill, asked.decode)
    assert [output_ids(asked.url, turn) for turn in turns] == expected
    answer = next_turn(asked, later, 16, len(begun[-1]) // PAGE)
    assert answer["output_ids"] == greedy(pair.url, later)
    caching.drained()
