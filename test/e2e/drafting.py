"""Two decode servers behind one prefill server, one of which drafts; what its clients may ask."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from .client import (
    FLIPPED_ROUNDING,
    Greedy,
    all_at_once,
    assert_drained,
    clients_leave,
    greedy,
    output_ids,
    payload,
    words,
)
from .conftest import COMMON
from .harness import Pair, launch, running_behind

PAGE = 32
SHORT = 40  # tokens of a prompt that decode computes itself
POOL_TOKENS = 3072
NATIVE = ("--hma-weight-format", "native")
NGRAM = ("--speculative-algorithm", "NGRAM")

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


@dataclass(frozen=True)
class Drafting:
    """One prefill server, a pair with it that drafts, and one that does not."""

    drafts: Pair
    plain: Pair

    def drained(self) -> None:
        assert_drained(self.drafts.prefill, self.drafts.decode, self.plain.decode)

    def many_at_once(self, jobs: list[tuple[list[int], int]]) -> None:
        """They say the same, and so many that some are put aside."""
        expected = [greedy(self.plain.url, *job) for job in jobs]
        answers = asyncio.run(all_at_once(self.drafts.url, jobs))
        refused = [(i, *answer) for i, answer in enumerate(answers) if answer[0] != 200]
        assert not refused, (len(refused), refused[:2])
        assert [answer["output_ids"] for _, answer in answers] == expected
        assert "Retract requests" in self.drafts.decode.text()
        self.drained()

    def option(self, option: str, seed: int, times: int) -> None:
        rng = random.Random(seed)
        prompt = words(rng, rng.randrange(SHORT, 120))
        body = payload(prompt, 40, return_logprob=True, top_logprobs_num=2)
        body["sampling_params"] |= OPTIONS[option]
        plain, *drafted = (
            requests.post(f"{url}/generate", json=body).json()
            for url in [self.plain.url] + [self.drafts.url] * times
        )
        for answer in drafted:
            same_as_far_as_sure(plain, answer)
        self.drained()

    def some_leave(self, seed: int) -> None:
        rng = random.Random(seed)
        prompts = [words(rng, rng.randrange(1, 200)) for _ in range(8)]
        leaving = [(each, 400) for each in prompts]
        asyncio.run(clients_leave(self.drafts.url, leaving, asyncio.sleep(rng.uniform(0, 2))))
        self.drained()
        expected = [greedy(self.plain.url, each) for each in prompts]
        assert [output_ids(self.drafts.url, each) for each in prompts] == expected
        self.drained()


def same_as_far_as_sure(plain: dict[str, Any], drafted: dict[str, Any]) -> None:
    """Behind a tie the two may say something else."""
    expected, was = Greedy.of(plain), plain["meta_info"]
    said, meta, sure = drafted["output_ids"], drafted["meta_info"], expected.sure
    assert said[:sure] == expected.tokens[:sure]
    if sure == len(expected.tokens):
        assert len(said) == sure and meta["finish_reason"] == was["finish_reason"]
    assert len(meta["output_top_logprobs"]) == len(said)
    own, other = (
        [value for value, *_ in each["output_token_logprobs"][:sure]] for each in (meta, was)
    )
    assert own == pytest.approx(other, abs=FLIPPED_ROUNDING)


@contextmanager
def running_drafting(name: str, model: Path, logs: Path, *drafts: str) -> Iterator[Drafting]:
    short = ("--hma-offload-threshold", str(SHORT))
    prefill = launch(f"{name}-prefill", model, logs, *COMMON, *NATIVE, *short, mode="prefill")
    small = ("--max-total-tokens", str(POOL_TOKENS), "--num-reserved-decode-tokens", "1")
    kinds: dict[str, tuple[str, ...]] = {"plain": (), "drafts": (*small, *drafts)}
    decodes = {
        kind: launch(f"{name}-{kind}", model, logs, *COMMON, *flags, mode="decode")
        for kind, flags in kinds.items()
    }
    with running_behind(prefill, decodes) as pairs:
        yield Drafting(**pairs)
