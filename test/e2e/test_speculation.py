"""NGRAM speculation on decode: what is said is what one token at a time says, in fewer steps.

Two decode servers behind one prefill server, one of them with drafts. A corpus remembers what it
has seen, so a question that is asked again is answered in few steps.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from .client import answered, generate, greedy, output_ids, payload, words
from .drafting import NGRAM, OPTIONS, PAGE, SHORT, Drafting, running_drafting
from .harness import until

pytestmark = [pytest.mark.e2e, pytest.mark.faults]


@pytest.fixture(scope="module")
def drafting(model: Path, logs: Path) -> Iterator[Drafting]:
    with running_drafting("ng", model, logs, *NGRAM) as servers:
        yield servers


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
    drafting.many_at_once(jobs)


@pytest.mark.parametrize("option", OPTIONS)
def test_options(drafting: Drafting, option: str, seed: int) -> None:
    """Alone, and again, when whole chains are right."""
    drafting.option(option, seed, times=2)


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
    drafting.some_leave(seed)


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
