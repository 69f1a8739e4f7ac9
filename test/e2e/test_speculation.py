"""NGRAM speculation on decode: what is said is what one token at a time says, in fewer steps.

Two decode servers behind one prefill server, one of them with drafts. A corpus remembers what it
has seen, so a question that is asked again is answered in few steps.
"""

import asyncio
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from .client import (
    FLIPPED_ROUNDING,
    Greedy,
    all_at_once,
    answered,
    assert_drained,
    generate,
    greedy,
    output_ids,
    payload,
    words,
)
from .conftest import COMMON
from .harness import Pair, launch, running_behind, until

PAGE = 32
SHORT = 40  # tokens of a prompt that decode computes itself
POOL_TOKENS = 3072
NGRAM = ("--speculative-algorithm", "NGRAM")

pytestmark = [pytest.mark.e2e, pytest.mark.faults]


@dataclass(frozen=True)
class Drafting:
    """One prefill server, a pair with it that drafts, and one that does not."""

    drafts: Pair
    plain: Pair

    def drained(self) -> None:
        assert_drained(self.drafts.prefill, self.drafts.decode, self.plain.decode)


@pytest.fixture(scope="module")
def drafting(model: Path, logs: Path) -> Iterator[Drafting]:
    short = ("--hma-offload-threshold", str(SHORT), "--hma-weight-format", "native")
    prefill = launch("ng-prefill", model, logs, *COMMON, *short, mode="prefill")
    small = ("--max-total-tokens", str(POOL_TOKENS), "--num-reserved-decode-tokens", "1")
    kinds = {"plain": (), "drafts": (*small, *NGRAM)}
    decodes = {
        name: launch(f"ng-{name}", model, logs, *COMMON, *flags, mode="decode")
        for name, flags in kinds.items()
    }
    with running_behind(prefill, decodes) as pairs:
        yield Drafting(**pairs)


def steps(answer: dict[str, Any]) -> int:
    return int(answer["meta_info"]["spec_verify_ct"])


@pytest.mark.parametrize("tokens", [3, SHORT - 1, SHORT, PAGE * 3, 217])
def test_the_same_tokens_in_fewer_steps(drafting: Drafting, tokens: int, seed: int) -> None:
    rng = random.Random(seed)
    prompt, more = words(rng, tokens), rng.randrange(60, 90)
    expected = greedy(drafting.plain.url, prompt, more)
    first, again = (generate(drafting.drafts.url, prompt, more) for _ in range(2))
    assert first["output_ids"] == expected
    assert again["output_ids"] == expected
    assert steps(first) <= more - 1
    # Once it has been said, whole chains are right, unless it repeats itself.
    if first["output_ids"] == again["output_ids"]:
        assert steps(again) <= more // 2
    drafting.drained()


def test_many_at_once_in_a_full_pool(drafting: Drafting, seed: int) -> None:
    """Drafts hold pages ahead of their requests: more of these are put aside, none is lost."""
    rng = random.Random(seed)
    asked = [words(rng, rng.randrange(1, 250)) for _ in range(10)]
    jobs = [(rng.choice(asked), rng.randrange(1, 150)) for _ in range(40)]
    expected = [greedy(drafting.plain.url, *job) for job in jobs]
    answers = asyncio.run(all_at_once(drafting.drafts.url, jobs))
    refused = [(i, *answer) for i, answer in enumerate(answers) if answer[0] != 200]
    assert not refused, (len(refused), refused[:2])
    assert [answer["output_ids"] for _, answer in answers] == expected
    assert "Retract requests" in drafting.drafts.decode.text()
    drafting.drained()


OPTIONS = {
    # Together they depend on the order in which SGLang applies them: that of a set, by process.
    "penalties": {"frequency_penalty": 0.6, "presence_penalty": 0.3},
    "repetition": {"repetition_penalty": 1.1},
    "at least so many": {"min_new_tokens": 12, "ignore_eos": False},
    "stops": {"stop_token_ids": [*range(8, 400)]},
    "the best of one": {"temperature": 1.3, "top_k": 1},
    "the best of few": {"temperature": 0.7, "top_p": 1e-6},
    "grammar": {"regex": "[a-z]{4,30}", "ignore_eos": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(drafting: Drafting, option: str, seed: int) -> None:
    """Alone, and beside requests without options, which go on in chains of eight."""
    rng = random.Random(seed)
    prompt = words(rng, rng.randrange(SHORT, 120))
    body = payload(prompt, 40, return_logprob=True, top_logprobs_num=2)
    body["sampling_params"] |= OPTIONS[option]
    plain, *drafted = (
        requests.post(f"{url}/generate", json=body).json()
        for url in (drafting.plain.url, drafting.drafts.url, drafting.drafts.url)
    )
    expected, was = Greedy.of(plain), plain["meta_info"]
    for answer in drafted:
        said, meta = answer["output_ids"], answer["meta_info"]
        # Behind a tie the two may say something else.
        sure = expected.sure
        assert said[:sure] == expected.tokens[:sure]
        if sure == len(expected.tokens):
            assert len(said) == sure and meta["finish_reason"] == was["finish_reason"]
        assert len(meta["output_top_logprobs"]) == len(said)
        own, other = (
            [value for value, *_ in each["output_token_logprobs"][:sure]] for each in (meta, was)
        )
        assert own == pytest.approx(other, abs=FLIPPED_ROUNDING)
    drafting.drained()


def test_sampled_answers_are_drawn_as_often_as_they_should(drafting: Drafting, seed: int) -> None:
    """Of the two best tokens at each place, also where a draft was one of them."""
    body = payload(words(random.Random(seed), 50), 64, return_logprob=True, top_logprobs_num=2)
    body["sampling_params"] |= {"temperature": 1.0, "top_k": 2}
    best, likely, variance = 0, 0.0, 0.0
    for _ in range(8):
        meta = requests.post(f"{drafting.drafts.url}/generate", json=body).json()["meta_info"]
        places = zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
        for (_, token, *_), ((first, top, *_), (second, other, *_)) in places:
            assert token in (top, other)
            p = 1 / (1 + math.exp(second - first))
            best, likely, variance = best + (token == top), likely + p, variance + p * (1 - p)
    assert abs(best - likely) <= 6 * variance**0.5
    drafting.drained()


def test_clients_that_leave(drafting: Drafting, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [words(rng, rng.randrange(1, 200)) for _ in range(8)]

    async def leave() -> None:
        jobs = [
            asyncio.create_task(all_at_once(drafting.drafts.url, [(each, 400)])) for each in prompts
        ]
        await asyncio.sleep(rng.uniform(0, 2))
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    asyncio.run(leave())
    drafting.drained()
    expected = [greedy(drafting.plain.url, each) for each in prompts]
    assert [output_ids(drafting.drafts.url, each) for each in prompts] == expected
    drafting.drained()


def test_prefill_dies_and_returns(drafting: Drafting, seed: int) -> None:
    """Last: another prefill server takes the port."""
    rng = random.Random(seed)
    prompt = words(rng, 150)
    expected = greedy(drafting.plain.url, prompt, 40)
    prefill = drafting.drafts.prefill
    prefill.stop()
    prefill.start()
    prefill.wait_healthy()
    until(lambda: answered(drafting.drafts, prompt), drafting.drafts.decode)
    assert output_ids(drafting.drafts.url, prompt, 40) == expected
    until(lambda: answered(drafting.plain, prompt), drafting.plain.decode)
    drafting.drained()
